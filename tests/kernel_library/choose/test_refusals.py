"""What no kernel runs: what was found, what is supported, what to do."""

from dataclasses import replace

import pytest
import torch

from fusedq_kernels.call import SCALED_BY_ROWS, SCALES_OF
from fusedq_kernels.catalogue import KERNELS, kernel_for, refusals
from fusedq_kernels.choose.boards import BOARDS, hip_device
from fusedq_kernels.choose.device import KNOWN_DEVICES, device_by_name
from fusedq_kernels.choose.refusals import of_device
from fusedq_kernels.dtype import DType
from fusedq_kernels.types import DeviceSpec, QuantSpec, WeightType

H200 = device_by_name("h200")
CPU = DeviceSpec("cpu", "cpu", cpu_isa="avx2")

SPEC = QuantSpec(WeightType.UINT4B8, 128, torch.bfloat16)
ZERO_SPEC = QuantSpec(WeightType.UINT4, 128, torch.float16)
SPECS = [
    QuantSpec(each, 128, scales[0], scales[0] in SCALED_BY_ROWS)
    for each, scales in SCALES_OF.items()
]
NVFP4 = QuantSpec(WeightType.FLOAT4_E2M1F, 16, torch.float8_e4m3fn, row_scaled=True)
RESHARD = "choose another tensor-parallel size, or leave"
REGROUP = "choose another tensor-parallel size, or quantize"
REQUANTIZE = "quantize the model again with scales"


def reasons(n=4096, k=4096, spec=SPEC, phase=0, device=H200, act_dtype=torch.bfloat16):
    own = refusals(kernel_for(device, spec.weight_type), n, k, spec, phase)
    return of_device(device, DType.of(act_dtype)) + own


@pytest.mark.parametrize("device", [*KNOWN_DEVICES.values(), CPU], ids=lambda d: d.name)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.weight_type.value)
def test_common_schemes_are_supported_everywhere(device, spec):
    for group_size, phase in (
        (8, 0),
        (24, 8),
        (48, 32),
        (32, 16),
        (64, 0),
        (96, 80),
        (128, 64),
        (1 << 20, 6848),
    ):
        spec = replace(spec, group_size=group_size)
        assert reasons(n=8, k=6848, spec=spec, phase=phase, device=device) == ()


@pytest.mark.parametrize(
    ("arguments", "expected", "fix"),
    [
        ({"n": 4100}, ("4100 out_features per rank", "multiples of 8"), RESHARD),
        ({"k": 4104}, ("4104 in_features per rank", "multiples of 16"), RESHARD),
        (
            {"act_dtype": torch.float32},
            ("activations in float32", "float16, bfloat16"),
            "run in",
        ),
        (
            {"device": DeviceSpec("t4", "cuda", (7, 5), 40, 65536)},
            ("t4 of compute capability 7.5", "8.0 and newer"),
            "use a newer GPU",
        ),
        (
            {"spec": replace(SPEC, group_size=36)},
            ("group_size 36", "multiples of 8, or one group for all in_features of the rank"),
            REGROUP,
        ),
        (
            {"phase": 8},
            ("a rank that starts 8 in_features into a group", "multiples of 16"),
            REGROUP,
        ),
        (
            {"spec": replace(ZERO_SPEC, scale_dtype=torch.float32)},
            ("scales in float32 beside zero points", "float16, bfloat16"),
            REQUANTIZE,
        ),
        (
            {"spec": replace(SPEC, scale_dtype=torch.float64)},
            ("scales in float64", "float16, bfloat16, float32"),
            REQUANTIZE,
        ),
        (
            {"spec": replace(NVFP4, row_scaled=False)},
            (
                "no scale of each row beside float8_e4m3fn",
                "one beside float8_e4m3fn alone, and always there",
            ),
            "convert the checkpoint again",
        ),
        (
            {"spec": replace(SPEC, row_scaled=True), "device": CPU},
            (
                "a scale of each row beside bfloat16",
                "one beside float8_e4m3fn alone, and always there",
            ),
            "convert the checkpoint again",
        ),
        (
            {"spec": replace(SPEC, group_size=33), "device": CPU},
            ("group_size 33", "even group sizes, or one group for all in_features of the rank"),
            REGROUP,
        ),
    ],
)
def test_unsupported_layer_names_found_needed_and_what_to_do(arguments, expected, fix):
    (reason,) = reasons(**arguments)
    assert reason[:2] == expected
    assert reason.fix.startswith(fix)


def test_all_reasons_are_collected():
    spec = replace(ZERO_SPEC, group_size=36, scale_dtype=torch.float32)
    device = DeviceSpec("t4", "cuda", (7, 5), 40, 65536)
    found = reasons(n=9, k=4100, spec=spec, phase=3, device=device, act_dtype=torch.float64)
    assert len(found) == 7


def test_a_single_group_has_no_group_limits():
    spec = replace(SPEC, group_size=4095)
    assert reasons(k=4080, spec=spec, phase=9) == ()
    assert reasons(spec=replace(SPEC, group_size=34), device=CPU) == ()
    assert len(reasons(spec=replace(SPEC, group_size=33), device=CPU)) == 1


def test_only_vllms_operator_takes_fp32_scales_beside_zero_points():
    spec = replace(ZERO_SPEC, scale_dtype=torch.float32)
    assert refusals(KERNELS["cpu-wna16"], 4096, 4096, spec, 0) == ()
    assert len(reasons(spec=spec, device=CPU)) == 1


def test_of_amds_gpus_those_run_that_were_compiled_for() -> None:
    known, other = BOARDS["mi300x"].device, hip_device("gfx90a", "gfx90a")
    assert of_device(known, DType.BFLOAT16) == ()
    (reason,) = of_device(other, DType.BFLOAT16)
    assert (reason.found, reason.supported) == (
        "AMD gfx90a",
        "of AMD's GPUs gfx942, gfx950",
    )
