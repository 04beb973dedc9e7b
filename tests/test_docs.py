"""The documentation is what the code says."""

import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from vllm_fusedq.formats import FORMATS
from vllm_fusedq.formats.autoround import DEFAULT_PACKING
from vllm_fusedq.formats.awq_packing import VERSIONS
from vllm_fusedq.formats.bitsandbytes import STATES
from vllm_fusedq.formats.compressed_tensors_weights import PACKINGS
from vllm_fusedq.formats.fusedq import LAYOUT_VERSION
from vllm_fusedq.formats.gptq_zeros import ZERO_OFFSETS
from vllm_fusedq.formats.shared.rows import bit_widths

ROOT = Path(__file__).resolve().parent.parent
FIRST_MINUTES = ROOT / "docs" / "first-minutes.md"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("serving_configs/*.md"),
        *ROOT.glob("deploy/*.md"),
    ]
)


def script(name: str) -> ModuleType:
    """A module of `scripts/`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def catalogue() -> ModuleType:
    return script("error_catalogue")


def test_the_support_table_is_up_to_date() -> None:
    text = (ROOT / "README.md").read_text()
    assert text == script("support_table").with_table(text), "run python scripts/support_table.py"


@pytest.mark.parametrize(
    ("page", "name"), [("devices", "device_table"), ("which-format", "format_sizes")]
)
def test_a_table_is_what_the_registries_say(page: str, name: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert text == script(name).with_table(text), f"run python scripts/{name}.py"


def test_only_nvidias_older_gpus_are_called_too_old() -> None:
    lines = (ROOT / "docs" / "devices.md").read_text().splitlines()
    assert [line.split()[1] for line in lines if "too old |" in line] == ["v100", "t4"]


def test_the_outputs_of_the_first_minutes_are_those_of_the_commands() -> None:
    text = FIRST_MINUTES.read_text()
    assert text == script("first_minutes").rewritten(text), "run python scripts/first_minutes.py"


def test_the_words_to_search_for_are_in_the_messages() -> None:
    """In ours, or in those of the installed vLLM."""
    root = Path(importlib.util.find_spec("vllm").origin).parent
    paths = ("config/model.py", "config/device.py", "config/vllm.py", "v1/worker/utils.py")
    theirs = "".join((root / path).read_text() for path in (*paths, "v1/core/kv_cache_utils.py"))
    # Literals that follow one another are one; what is filled in is a model's or a machine's.
    theirs = re.sub(r'"\s+f?"', "", theirs).replace("{model_config.quantization}", "fusedq")
    ours = (ROOT / "docs" / "errors.md").read_text()
    ours += (ROOT / "vllm_fusedq" / "integration" / "register.py").read_text()
    table = FIRST_MINUTES.read_text().partition("| the log says")[2]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    words = [each for cell in cells for each in re.findall("`([^`]+)`", cell)]
    assert len(words) > 10
    of_torch = ["CUDA out of memory", "CPU Generator does not use offset"]
    assert [each for each in words if each not in theirs + ours] == of_torch


@pytest.mark.parametrize(
    ("format_name", "variants"),
    [
        ("awq", VERSIONS),
        ("gptq", ZERO_OFFSETS),
        ("compressed-tensors", PACKINGS),
        ("auto-round", ["auto_round", DEFAULT_PACKING, "auto_round:auto_awq"]),
        ("bitsandbytes", [weight_type.name for weight_type in STATES.values()]),
        ("fusedq", [f"version {LAYOUT_VERSION}"]),
    ],
)
def test_the_support_table_names_every_variant(format_name: str, variants: Iterable[str]) -> None:
    told = " ".join(row.checkpoint for row in FORMATS[format_name].support)
    for variant in variants:
        assert re.search(rf"\b{variant}\b", told), f"{format_name} says nothing of {variant}"


def test_every_format_is_in_the_support_table() -> None:
    assert all(known.support for known in FORMATS.values())


@pytest.mark.parametrize(
    ("bits", "words"),
    [((4,), "4 bits"), ((2, 3, 4, 8), "2, 3, 4, 8 bits"), (range(2, 9), "2 to 8 bits")],
)
def test_bit_widths_in_words(bits: Sequence[int], words: str) -> None:
    assert bit_widths(bits) == words


def test_the_way_of_a_layer_lists_every_folder() -> None:
    page = (ROOT / "docs" / "how-a-layer-reaches-the-kernel.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    listed = {name for cell in rows for name in re.findall(r"`(\w+)/`", cell)}
    packages = (ROOT / "vllm_fusedq", ROOT / "kernels" / "fusedq_kernels")
    folders = {path.parent.name for each in packages for path in each.glob("*/__init__.py")}
    assert listed == folders | {"fusedq_kernels"}


def test_the_error_catalogue_is_up_to_date(catalogue: ModuleType) -> None:
    written = (ROOT / "docs" / "errors.md").read_text()
    assert written == catalogue.catalogue(), "run python scripts/error_catalogue.py"


def test_the_catalogue_follows_names_and_both_branches(
    tmp_path: Path, catalogue: ModuleType
) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        'LIMIT = "two"\n'
        "def check(size, odd):\n"
        '    kind = "odd" if odd else "even"\n'
        '    where = f"in {kind} rows"\n'
        '    raise SettingsError(f"found {size} {where}; at most {LIMIT}" + ", as planned")\n'
        "def other(layer):\n"
        '    return Problem(layer, found="a", supported="b", fix=f"c {layer.name}")\n'
    )
    assert list(catalogue.messages(source)) == [
        ("SettingsError", "found <size> in (odd | even) rows; at most two, as planned"),
        ("problem", "a", "b", "c <name>"),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target
