"""What is tried, what is discarded, how tuning ends and goes on; times are given, not taken."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from fusedq_kernels import guard, ops
from fusedq_kernels.audit import variants
from fusedq_kernels.choose import own_rows, tuning
from fusedq_kernels.choose.device import KNOWN_DEVICES, device_by_name
from fusedq_kernels.choose.heuristics import select
from fusedq_kernels.dtype import DType
from fusedq_kernels.types import DeviceSpec, GemmShape, QuantSpec, WeightType
from vllm_fusedq.errors import OutputError
from vllm_fusedq.measure.candidates import Measurement, candidates
from vllm_fusedq.measure.roofline import likely_rates, rates_for
from vllm_fusedq.measure.rows_file import RowsFile
from vllm_fusedq.measure.timing import Timing
from vllm_fusedq.measure.tuner import Job, Tuner

H200 = device_by_name("h200")
SPEC = QuantSpec(WeightType.UINT4B8, 32, DType.FLOAT16)
JOB = Job(128, 256, SPEC, (64, 8))
CPU = torch.device("cpu")


def timing(us: float) -> Timing:
    return Timing(us, *(0.0, 1, us)[: len(Timing._fields) - 1])


def given(*times: float) -> Callable[[Sequence[object], torch.device], Timing]:
    """A stop watch that runs each call once and shows these times."""
    rest = iter(times)

    def measure(calls: Sequence[Callable[[], object]], device: torch.device) -> Timing:
        for call in calls:
            call()
        return timing(next(rest))

    return measure


def tuner(measure: Callable[..., Timing], keep: int = 2) -> Tuner:
    return Tuner(CPU, H200, torch.float16, keep, measure=measure)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the user, Triton 3.9.0."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "triton_version", lambda: "3.9.0")
    tuning.forget()
    yield tmp_path
    tuning.forget()


@pytest.mark.parametrize(
    ("name", "m", "weight_type"),
    [
        ("h200", 8, WeightType.UINT4B8),
        ("h200", 2048, WeightType.UINT4B8),
        ("rtx4090", 64, WeightType.NF4),
        ("b200", 16, WeightType.UINT4B8),
    ],
)
def test_every_tile_that_is_tried_is_audited(name: str, m: int, weight_type: WeightType) -> None:
    device, k = KNOWN_DEVICES[name], 4096
    spec = QuantSpec(weight_type, 64, DType.BFLOAT16)
    covered = {each.key() for each in _launchable(device.capability)}
    found = candidates(GemmShape(m, 6144, k), spec, device, likely_rates(device), keep=1000)
    assert len(found) > 5
    for tile in found:
        for has_bias in (True, False):
            variant = variants.standing_for(tile, spec, k, 0, torch.bfloat16, has_bias)
            assert variant.key() in covered


def _launchable(capability: tuple[int, int], known: dict = {}) -> object:  # noqa: B006
    if capability not in known:
        known[capability] = variants.launchable(device_by_name("sm_{}{}".format(*capability)))
    return known[capability]


def test_an_unknown_gpu_is_ordered_like_its_nearest_relative() -> None:
    unknown = DeviceSpec("some-new-gpu", "cuda", (8, 9), 120, 99 * 1024)
    assert rates_for(unknown) is None
    assert likely_rates(unknown) == rates_for(device_by_name("rtx4090"))
    assert likely_rates(H200) == rates_for(H200)


def test_the_fastest_right_launch_becomes_a_row_that_plans_name(cache) -> None:
    file = RowsFile(H200, "3.9.0")
    (found,) = tuner(given(9.0, 5.0)).run([JOB._replace(tokens=(64,))])
    assert [trial.note for trial in found.trials] == ["", ""]
    assert (found.done, found.total, found.remaining) == (1, 1, 0.0)
    file.add(found.measurements)
    tuning.forget()
    launch = select(GemmShape(64, 128, 256), SPEC, H200)
    assert launch.source == "tuned: yours, row 1"
    assert launch.tile == found.trials[1].launch.tile == found.best.launch.tile


def test_wrong_and_failing_launches_are_discarded_and_told(monkeypatch) -> None:
    calls = []

    def check(reached, kernel, packed, truth):
        calls.append(reached)
        return guard.Difference(reached, 64, 3, 0, 0, "worst") if len(calls) == 1 else None

    monkeypatch.setattr(guard, "check", check)

    def measure(calls: Sequence[object], device: torch.device) -> Timing:
        raise RuntimeError("out of shared memory")

    (found,) = tuner(measure).run([JOB._replace(tokens=(8,))])
    assert [trial.note for trial in found.discarded] == [
        "WRONG: 3 of 64 outputs wrong (the worst: worst)",
        "FAILED: RuntimeError: out of shared memory",
    ]
    assert found.best is None
    assert found.measurements == []
    # With a bias and without one
    assert [reached.has_bias for reached in calls] == [True, True, False]


def test_a_kernel_that_is_wrong_in_one_output_gets_no_row(monkeypatch) -> None:
    rules = select(GemmShape(8, 128, 256), SPEC, H200, table_for=lambda _: None).tile
    run = ops.run

    def off_by_one(x, packed, bias, launch, out=None):
        y = run(x, packed, bias, launch, out=out)
        y[0, 0] += launch.tile != rules
        return y

    monkeypatch.setattr(ops, "run", off_by_one)
    (found,) = tuner(given(1.0)).run([JOB._replace(tokens=(8,))])
    (wrong,) = found.discarded
    assert wrong.note.startswith("WRONG: 1 of 1024 outputs wrong (the worst: token 0, output 0: ")
    assert [each.tile for each in found.measurements] == [rules]


def measurement(m: int, us: float, n: int = 128) -> Measurement:
    shape = GemmShape(m, n, 256)
    tile = select(shape, SPEC, H200, table_for=lambda _: None).tile
    return Measurement(shape, SPEC, tile, us)


def test_a_stopped_file_is_gone_on_with(cache) -> None:
    others = replace(SPEC, scale_dtype=DType.BFLOAT16)
    weights = [(128, 256, SPEC), (256, 256, SPEC), (128, 256, others)]
    file = RowsFile(H200, "3.9.0")
    # The third runs the code of the first; 64 tokens, without which a shape has no rows, come first
    jobs = file.left_of(weights, (8, 64))
    assert [(job.n, job.tokens) for job in jobs] == [(128, (64, 8)), (256, (64, 8))]
    file.add([measurement(64, 3.0), measurement(64, 4.0)])
    again = RowsFile(H200, "3.9.3")
    assert again.rows == file.rows
    assert [(job.n, job.tokens) for job in again.left_of(weights, (8, 64))] == [
        (128, (8,)),
        (256, (64, 8)),
    ]
    again.add([measurement(8, 2.0)])
    assert [(row.max_m, row.us) for row in RowsFile(H200, "3.9.0").rows] == [(8, 2.0), (64, 3.0)]


def test_a_shape_without_its_most_important_row_leaves_the_file_alone(cache) -> None:
    file = RowsFile(H200, "3.9.0")
    file.add([measurement(8, 2.0)])
    assert not file.path.exists()


def test_time_that_is_over_measures_nothing() -> None:
    assert list(tuner(given()).run([JOB], seconds=0)) == []


def test_the_file_is_whole_whenever_a_run_ends(cache, monkeypatch) -> None:
    file = RowsFile(H200, "3.9.0")
    file.add([measurement(64, 3.0)])
    before = file.path.read_bytes()
    written = []

    def dies(self, target):
        written.append(self.read_text())
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", dies)
        with pytest.raises(KeyboardInterrupt):
            file.add([measurement(64, 3.0, n=256)])
    assert written
    assert file.path.read_bytes() == before
    # What a kill leaves behind does not stand in the way
    (file.path.parent / ".h200.left").mkdir()
    again = RowsFile(H200, "3.9.0")
    again.add([measurement(64, 3.0, n=256)])
    assert [(row.n, row.max_m) for row in again.rows] == [(128, 64), (256, 64)]
    assert json.loads(file.path.read_text())["device"] == "h200"


def test_two_that_tune_at_once_are_told(cache) -> None:
    file = RowsFile(H200, "3.9.0")
    with file.alone():
        other = RowsFile(H200, "3.9.0")
        with pytest.raises(OutputError, match="another fusedq tune writes it"), other.alone():
            pass


def test_a_damaged_file_is_not_overwritten(cache) -> None:
    path = own_rows.own_file(H200, "3.9.0")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(OutputError, match=r"not a file of measured rows .*remove it"):
        RowsFile(H200, "3.9.0")
    assert path.read_text() == "{"


def test_a_cache_that_cannot_be_written_is_said(cache, monkeypatch) -> None:
    file = RowsFile(H200, "3.9.0")
    # A file in the place of the folder is in everyone's way, root's too
    file.path.parent.parent.parent.mkdir(parents=True)
    file.path.parent.parent.write_text("")
    said = r"measured rows cannot be written: .*XDG_CACHE_HOME"
    with pytest.raises(OutputError, match=said), file.alone():
        pass
    with pytest.raises(OutputError, match="measured rows cannot be written"):
        file.add([measurement(64, 3.0)])


def test_times_are_of_every_copy(monkeypatch) -> None:
    from vllm_fusedq.measure import tuner as module

    monkeypatch.setattr(module, "copies_for", lambda size, device: 3)
    seen = []

    def measure(calls: Sequence[Callable[[], torch.Tensor]], device: torch.device) -> Timing:
        seen.append([call() for call in calls])
        return timing(1.0)

    list(tuner(measure, keep=1).run([JOB._replace(tokens=(8,))]))
    (outputs,) = seen
    assert len(outputs) == 3
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    assert math.isfinite(outputs[0].float().abs().max().item())
