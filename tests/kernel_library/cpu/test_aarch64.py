"""cpu-fused as an emulated CPU of aarch64 runs it: cross-compiled, without PyTorch."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fusedq_kernels import testing
from fusedq_kernels.cpu import fused
from fusedq_kernels.dtype import DType
from fusedq_kernels.layouts.packing import pack
from fusedq_kernels.native import build
from fusedq_kernels.native.isa import ISAS
from fusedq_kernels.types import TILED_LAYOUTS, QuantSpec, WeightType

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
HARNESS = Path(__file__).with_name("emulated.cpp")
# group, K, phase: steps of every size, groups of several blocks and cut ones.
SPLITS = [(128, 512, 0), (128, 400, 48), (32, 256, 0), (8, 144, 0), (256, 768, 128)]
N = 40
TOKENS = (1, 3, 33)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(scope="module")
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that answers problems; compiled in half a minute."""
    if not request.config.getoption("--aarch64"):
        pytest.skip("takes a minute: --aarch64")
    if missing := [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]:
        pytest.skip(f"this machine has no {' and no '.join(missing)}")
    program = tmp_path_factory.mktemp("aarch64") / "emulated"
    isa = ISAS["generic"]
    # The harness has the operator in itself
    units = [HARNESS, *(source for source in build.sources() if source.stem != "op")]
    command = [*build.unit_command(COMPILER, HARNESS, isa), f"-I{build.SOURCES}", "-O1", "-w"]
    command = [each for each in command if each not in ("-c", str(HARNESS))]
    # Of PyTorch's own functions the program calls those that it brings
    link = ["-static", "-Wl,--unresolved-symbols=ignore-all"]
    command = [*command, *map(str, units), "-o", str(program), *link]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return program


def bytes_of(problem: testing.Problem) -> bytes:
    """A problem as emulated.cpp reads it."""
    x, weight_type = problem.x, problem.logical.spec.weight_type
    packed = pack(problem.logical, TILED_LAYOUTS[weight_type], x.dtype)
    size = (packed.layout, packed.spec, packed.k, packed.phase)
    numbers, codebook = fused.arguments(*size, DType.of(x.dtype))
    weight, scales = packed.qweight, packed.scales
    sizes = [len(x), *weight.shape[:2], scales.stride(0), scales.shape[2], packed.n]
    half = x.dtype == torch.float16
    parts = [
        torch.tensor(numbers),
        torch.tensor([*sizes, int(half)]),
        *(weight, scales, x, problem.bias),
        torch.tensor(codebook, dtype=torch.float64),
    ]
    raw = [part.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for part in parts]
    return b"".join(len(each).to_bytes(8, "little") + each for each in raw)


def problems() -> list[testing.Problem]:
    return [
        testing.make_problem(
            tokens,
            N,
            k,
            QuantSpec(weight_type, group, dtype),
            phase=phase,
            act_dtype=dtype,
            has_bias=True,
        )
        for weight_type in WeightType
        for group, k, phase in SPLITS
        for dtype in ROUNDING
        for tokens in TOKENS
    ]


def test_an_emulated_cpu_of_aarch64_gives_the_answers(emulated: Path, tmp_path: Path) -> None:
    asked, answers = problems(), tmp_path / "answers"
    raw = [bytes_of(each) for each in asked]
    count = (8).to_bytes(8, "little") + len(raw).to_bytes(8, "little")
    (tmp_path / "problems").write_bytes(count + b"".join(raw))
    command = [EMULATOR, str(emulated), str(tmp_path / "problems"), str(answers)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given = torch.frombuffer(bytearray(answers.read_bytes()), dtype=torch.int16)
    for each, found in zip(asked, given.split([y.expected.numel() for y in asked]), strict=True):
        unit = ROUNDING[each.x.dtype]
        y = found.view(each.x.dtype).view_as(each.expected)
        testing.assert_close(y, each.expected, max_error=5 * unit, rms_error=unit)
