"""Damaged checkpoints end in a right load or in a typed error that names the damage.

2,000 cases by default; `pytest tests/fuzz --fuzz-cases 10000 --fuzz-seed 1` runs others. A failure
names its seed and number, and runs alone with `--fuzz-seed SEED --fuzz-only NUMBER`.
"""

import random
from pathlib import Path

import pytest
import torch

from checkpoints import ALL_BUILDS
from harness import Draft, Setting, pristine, run_case
from mutations import mutate

# Ranks begin inside groups at 2 and 4 ranks; whole groups of AWQ's fast packing at 1 and 2.
SIZES = {"hidden": 128, "intermediate": 192, "group_size": 32}
SHOWN = 8
CONVERTED = ("gptq-sym", "ct-asym", "gptq-asym-order")
SUBJECTS = [(build, False) for build in ALL_BUILDS] + [(build, True) for build in CONVERTED]


def case_count(config: pytest.Config) -> int:
    return -(-config.getoption("fuzz_cases") // len(SUBJECTS))


def settings_for(draft: Draft, path: Path) -> list[Setting]:
    """The settings at which the untouched checkpoint loads."""
    settings = [
        Setting(device, tp_size, rank)
        for device in ("cpu", "gpu")
        for tp_size in (1, 2, 4)
        for rank in range(tp_size)
    ]
    return [each for each in settings if run_case(draft, path, each, torch.float16) is None]


@pytest.mark.parametrize(("build", "converted"), SUBJECTS)
def test_damage_is_refused_by_name_or_harmless(
    build: str, converted: bool, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    untouched = pristine(build, tmp_path, converted, **SIZES)
    path = tmp_path / "fuzz"
    settings = settings_for(untouched, path)
    assert settings, f"an untouched {build} checkpoint does not load anywhere"
    seed, only = pytestconfig.getoption("fuzz_seed"), pytestconfig.getoption("fuzz_only")
    numbers = range(case_count(pytestconfig)) if only is None else [only]
    failures = []
    for number in numbers:
        rng = random.Random(f"{build} {converted} {seed} {number}")
        draft = untouched.copy()
        mutate(draft, rng)
        setting = rng.choice(settings)
        if problem := run_case(draft, path, setting, torch.float16):
            failures.append(f"case {number} of seed {seed}, {setting}, {draft.log}: {problem:.900}")
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures[:SHOWN])
