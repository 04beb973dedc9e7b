"""`scripts/check_vllm_hooks.py`: silent on the vLLM that runs here, loud on each way to differ."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_vllm_hooks.py"
BASE = "vllm/model_executor/layers/quantization/base_config.py"
LINEAR = "vllm/model_executor/layers/linear.py"
LOADER = "vllm/model_executor/models/utils.py"

_spec = importlib.util.spec_from_file_location("check_vllm_hooks", SCRIPT)
hooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hooks)


def changed(folder: Path, file: str, old: str, new: str) -> Path:
    """A folder with the installed vLLM, but for one text in one file."""
    source = hooks.installed()
    for part in Path(file).parts:
        folder.mkdir(exist_ok=True)
        for sibling in source.iterdir():
            if sibling.name != part and (sibling.is_dir() or sibling.suffix == ".py"):
                (folder / sibling.name).symlink_to(sibling)
        source, folder = source / part, folder / part
    text = source.read_text()
    assert old in text
    folder.write_text(text.replace(old, new))
    return folder.parents[len(Path(file).parts) - 1]


def test_the_installed_vllm_fits() -> None:
    assert hooks.problems(hooks.installed()) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        (
            BASE,
            "def maybe_update_config(",
            "def update_config(",
            f"{hooks._BASE}.QuantizationConfig has no def maybe_update_config",
        ),
        (
            BASE,
            "    def get_name(self)",
            "    def get_family(self): ...\n\n    @abstractmethod\n    def get_name(self)",
            "config.py: FusedQConfig.get_family is missing, "
            "QuantizationConfig declares it abstract",
        ),
        (
            BASE,
            "self, layer: torch.nn.Module, prefix: str",
            "self, layer: torch.nn.Module, prefix: str, stage: int",
            "config.py: FusedQConfig.get_quant_method does not take 'stage', "
            "which QuantizationConfig declares",
        ),
        (
            LINEAR,
            "input_size_per_partition: int,",
            "rank: int, input_size_per_partition: int,",
            "linear.py: FusedQLinearMethod.create_weights does not take "
            "'input_size_per_partition', which LinearMethodBase declares",
        ),
        (
            LINEAR,
            "class RowParallelLinear(",
            "class RowShardedLinear(",
            "linear.py: vllm.model_executor.layers.linear has no RowParallelLinear",
        ),
        (
            LOADER,
            "quant_config.get_cache_scale_mapper()",
            "quant_config.get_cache_scale_mapper() | quant_config.get_name_mapper()",
            f"{hooks.LOADER} renames tensors by get_name_mapper, "
            "which the plugin does not override",
        ),
    ],
)
def test_every_difference_is_named(
    tmp_path: Path, file: str, old: str, new: str, expected: str
) -> None:
    assert expected in hooks.problems(changed(tmp_path / "vllm", file, old, new))


def test_the_exit_status_and_the_folder_without_vllm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check: Callable[[list[str]], int] = hooks.main
    assert check([]) == 0
    assert check([str(tmp_path)]) == 1
    assert f"{tmp_path} holds no vllm/__init__.py" in capsys.readouterr().out
    monkeypatch.setattr(hooks, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="no vLLM is installed: name a folder"):
        check([])
