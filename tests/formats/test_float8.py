"""8-bit floats: the numbers of the tools that write them, odd blocks, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file

from builders.float8 import ROWS
from checkpoints import ALL_BUILDS, FLOAT_BUILDS, Tensors, add, drop, put, write_checkpoint
from fusedq_kernels import reference
from kv_scales import kv_scales
from layers import MODULE, cut, describe, problems_of
from tiny_models import UNQUANTIZED, asset
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import FusedQError, PreflightError, WeightLoadError
from vllm_fusedq.formats import LayerFormat, Region, format_for
from vllm_fusedq.plan.kv_cache import served_kv_dtype

UP = "model.layers.0.mlp.up_proj"
STRATEGIES = {
    "tensor": {},
    "channel": {},
    "group": {"group_size": 48},
    "block": {"block_structure": [32, 64]},
}


def decoded(layer: LayerFormat, tensors: Tensors, region: Region | None = None) -> torch.Tensor:
    region = region or layer.whole
    return reference.dequantize(layer.packing.logical(cut(layer, tensors, region), layer, region))


def compressed(strategy: str, weight: torch.Tensor) -> tuple[Tensors, QuantizationArgs]:
    """A weight as the compressed_tensors package stores it, with absmax scales."""
    args = QuantizationArgs(
        num_bits=8, type="float", symmetric=True, strategy=strategy, **STRATEGIES[strategy]
    )
    n, k = weight.shape
    whole = {"tensor": (n, k), "channel": (1, k), "group": (1, 48), "block": (32, 64)}
    rows, columns = whole[strategy]
    padded = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, -1, columns)
    scale = (blocks.abs().amax((1, 3)) / 448).to(weight.dtype)
    scale = scale.flatten() if strategy == "tensor" else scale
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("naive-quantized")
    state = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    return state, args


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_numbers_are_those_of_compressed_tensors(strategy: str, dtype: torch.dtype) -> None:
    weights = load_file(asset(UNQUANTIZED) / "model.safetensors")
    weight = weights[f"{UP}.weight"][:232, :240].to(dtype).contiguous()
    tensors, args = compressed(strategy, weight)
    assert tensors["weight"].dtype is torch.float8_e4m3fn
    config = ALL_BUILDS["ct-float-block"].config(48)["config_groups"]
    config["group_0"]["weights"] = args.model_dump(mode="json")
    layer, _ = describe("ct-float-block", None, 48, tensors, config_groups=config)
    values = decoded(layer, tensors)
    if strategy == "block":
        # The package infers blocks from sizes that they divide
        scales = tensors["weight_scale"].repeat_interleave(32, 0).repeat_interleave(64, 1)
        theirs = tensors["weight"].to(dtype) * scales[:232, :240]
    else:
        theirs = dequantize(tensors["weight"], tensors["weight_scale"], args=args)
    assert torch.equal(values.to(dtype), theirs)
    assert layer.description.startswith("compressed-tensors float-quantized 8-bit ")


@pytest.mark.parametrize("build", ["ct-float-block", "fp8-block"])
@pytest.mark.parametrize("n", [8, ROWS, 40, 64])
def test_a_rank_begins_and_ends_inside_blocks(build: str, n: int) -> None:
    truth = ALL_BUILDS[build].truth(n, 112, 32)
    layer, tensors = describe(build, truth, 32)
    for region in (layer.whole, Region(3, n - 2, 8, 104), Region(n // 2, n, 48, 112)):
        bounds = (region.n_start, region.n_stop, region.k_start, region.k_stop)
        assert torch.equal(decoded(layer, tensors, region).double(), truth.values(*bounds))


def test_every_number_and_both_zeros() -> None:
    layer, tensors = describe("fbgemm-fp8", ALL_BUILDS["fbgemm-fp8"].truth(8, 128, -1), -1)
    codes = torch.arange(256, dtype=torch.uint8).repeat(4).view(8, 128)
    codes[codes & 127 == 127] = 0
    tensors["weight"], tensors["weight_scale"] = codes.view(torch.float8_e4m3fn), torch.ones(8, 1)
    values = decoded(layer, tensors)
    assert torch.equal(values, tensors["weight"].float())
    assert torch.equal(values.signbit(), codes > 127)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("build", FLOAT_BUILDS)
def test_nan_is_refused_by_the_layers_name(build: str, code: int) -> None:
    layer, tensors = describe(build, ALL_BUILDS[build].truth(16, 64, 32), 32)
    weight = tensors["weight"].view(torch.uint8)
    weight[3, 5] = weight[11, 60] = code
    message = rf"{MODULE}.weight: found 2 codes of NaN, expected numbers; .* quantize it again"
    with pytest.raises(WeightLoadError, match=message):
        decoded(layer, tensors)
    decoded(layer, tensors, Region(4, 16, 0, 32))


@pytest.mark.parametrize("build", ["ct-mxfp8", "modelopt-mxfp8", "fp8-block-e8m0"])
def test_every_exponent_of_a_scale_is_a_number_but_the_last(build: str) -> None:
    made = ALL_BUILDS[build]
    tensors = made.tensors(made.truth(64, 128, 32))
    (name,) = set(tensors) - {"weight"}
    codes = tensors[name].view(torch.uint8)
    codes.copy_(torch.arange(codes.numel()).view(codes.shape) % 255)
    tensors["weight"] = torch.ones(64, 128).to(torch.float8_e4m3fn)
    layer, _ = describe(build, None, 32, tensors)
    rows = 64 // len(codes) if len(codes) == 64 else ROWS
    powers = 2.0 ** (codes.double() - 127)
    powers = powers.repeat_interleave(rows, 0)[:64].repeat_interleave(32, 1)
    assert torch.equal(decoded(layer, tensors).double(), powers)
    codes[0, 1] = 255
    with pytest.raises(WeightLoadError, match=f"{MODULE}.{name}: found 1 NaN or infinite values"):
        decoded(layer, tensors)


@pytest.mark.parametrize("build", ["ct-float-block", "fp8-block", "modelopt-fp8-block"])
def test_bytes_are_no_scales_where_no_format_says_so(build: str) -> None:
    made = ALL_BUILDS[build]
    tensors = made.tensors(made.truth(64, 128, 32))
    (name,) = set(tensors) - {"weight"}
    tensors[name] = tensors[name].to(torch.uint8)
    with pytest.raises(PreflightError, match=f"{name} stored as U8; supported: F8_E8M0 or F32"):
        describe(build, None, 32, tensors)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float8_e5m2])
def test_another_8_bit_float_is_no_plain_weight(dtype: torch.dtype, tmp_path: Path) -> None:
    edits = [drop(f"{UP}.weight"), add(f"{UP}.weight", torch.ones(96, 64).to(dtype))]
    write_checkpoint(tmp_path, "fp8-block", edits=edits)
    (problem,) = problems_of(format_for(read_checkpoint(tmp_path)), UP)
    assert "weight stored as F8_E" in problem.found
    assert problem.supported == "F8_E4M3"


@pytest.mark.parametrize("build", ["ct-float-tensor", "fp8-tensor"])
def test_one_scale_is_one_number(build: str) -> None:
    tensors = ALL_BUILDS[build].tensors(ALL_BUILDS[build].truth(16, 64, -1))
    for shape in ([], [1], [1, 1]):
        tensors["weight_scale"] = tensors["weight_scale"].reshape(shape)
        layer, _ = describe(build, None, -1, tensors)
        assert decoded(layer, tensors).isfinite().all()
    tensors["weight_scale"] = torch.ones(16)
    with pytest.raises(PreflightError, match=r"weight_scale of shape \[16\]; supported: \[1\]"):
        describe(build, None, -1, tensors)


def test_a_scale_for_each_row_has_one_dimension_or_two() -> None:
    truth = ALL_BUILDS["ct-float-channel"].truth(16, 64, -1)
    tensors = ALL_BUILDS["ct-float-channel"].tensors(truth)
    for shape in ([16], [16, 1]):
        tensors["weight_scale"] = tensors["weight_scale"].reshape(shape)
        layer, _ = describe("ct-float-channel", None, -1, tensors)
        region = Region(4, 12, 16, 48)
        assert torch.equal(decoded(layer, tensors, region).double(), truth.values(4, 12, 16, 48))
    tensors["weight_scale"] = torch.ones(1)
    with pytest.raises(PreflightError, match=r"weight_scale of shape \[1\]; supported: \[16\]"):
        describe("ct-float-channel", None, -1, tensors)


def test_what_has_no_scale_and_is_no_float_is_left_alone(tmp_path: Path) -> None:
    """fp8 configs need not list what stays as it is; a float without a scale is damage, which
    excluding it would not mend."""
    plain = add(f"{UP}.weight", torch.zeros(96, 64))
    edits = [drop(f"{UP}.weight_scale_inv"), plain]
    write_checkpoint(tmp_path / "plain", "fp8-block", edits=edits)
    fmt = format_for(read_checkpoint(tmp_path / "plain"))
    assert fmt.layer_of(UP) is None
    assert UP not in fmt.modules()
    write_checkpoint(tmp_path / "damaged", "fp8-block", edits=edits[:1])
    fmt = format_for(read_checkpoint(tmp_path / "damaged"))
    (problem,) = problems_of(fmt, UP)
    assert problem.found == "no tensor weight_scale_inv (only weight)"


def test_the_lm_head_and_embeddings_may_be_floats(tmp_path: Path) -> None:
    edits = []
    for module in ("lm_head", "model.embed_tokens"):
        made = ALL_BUILDS["fp8-block"]
        for name, tensor in made.tensors(made.truth(32, 64, 32)).items():
            edits.append(add(f"{module}.{name}", tensor))
    write_checkpoint(tmp_path, "fp8-block", edits=edits)
    fmt = format_for(read_checkpoint(tmp_path))
    assert fmt.layer_of("lm_head").description.startswith("fp8 24x32 8-bit g32")
    assert fmt.layer_of("model.embed_tokens") is not None


def test_a_static_kv_cache_of_autofp8(tmp_path: Path) -> None:
    config = {"activation_scheme": "static", "kv_cache_scheme": "static"}
    edits = [kv_scales((0.03, 0.03), spelling="shared")]
    write_checkpoint(tmp_path, "fp8-tensor", config=config, edits=edits)
    fmt = format_for(read_checkpoint(tmp_path))
    assert served_kv_dtype(fmt, "auto") == "fp8"
    assert fmt.layer_of(UP).activations == "8-bit float, static"


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "scheme": ("fp8-block", {"activation_scheme": "never"}, "activation_scheme 'never'; .* static"),
    "fmt": ("fp8-block", {"fmt": "e5m2"}, "fmt 'e5m2'; supported by fp8: fmt e4m3"),
    "store": ("fp8-block", {"store_dtype": "mxfp4"}, "store_dtype 'mxfp4'; .*weights of 8 bits"),
    "block": (
        "fp8-block",
        {"weight_block_size": [128, 12]},
        r"weight_block_size \[128, 12\]; supported by fp8: null or two sizes",
    ),
    "block 1": ("fp8-block", {"weight_block_size": 128}, "weight_block_size 128"),
    "block 0": ("fp8-block", {"weight_block_size": [0, 128]}, r"weight_block_size \[0, 128\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_config(case: str, tmp_path: Path) -> None:
    build, config, message = REFUSED[case]
    write_checkpoint(tmp_path, build, config=config)
    with pytest.raises(FusedQError, match=message):
        format_for(read_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 4}, "float weights with num_bits 4 in group_0; .*8-bit float weights, stat"),
        ({"symmetric": False}, "float weights with symmetric False in group_0"),
        ({"dynamic": True}, "float weights with dynamic True"),
        ({"actorder": "group"}, "float weights with actorder 'group'"),
        ({"strategy": "attn_head"}, "strategy 'attn_head' of float weights in group_0; .*tensor"),
        ({"block_structure": None}, "block_structure None in group_0; .*two sizes"),
        ({"strategy": "group", "group_size": 12}, "group_size 12"),
    ],
)
def test_refuses_a_group_of_floats(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = ALL_BUILDS["ct-float-block"].config(32)
    config["config_groups"]["group_0"]["weights"] |= changes
    write_checkpoint(tmp_path, "ct-float-block", config=config)
    with pytest.raises(FusedQError, match=message):
        format_for(read_checkpoint(tmp_path))


def test_integers_are_no_floats(tmp_path: Path) -> None:
    config = ALL_BUILDS["ct-float-block"].config(32)
    config["config_groups"]["group_0"]["weights"] |= {"type": "int"}
    write_checkpoint(tmp_path, "ct-float-block", config=config)
    message = "8-bit int weights in group_0, float-quantized; .*8-bit float ones, float-quantized"
    with pytest.raises(FusedQError, match=message):
        format_for(read_checkpoint(tmp_path))


def test_a_scale_that_is_no_number_is_refused() -> None:
    layer, tensors = describe("fp8-block", ALL_BUILDS["fp8-block"].truth(48, 64, 32), 32)
    put("weight_scale_inv", (1, 1), float("inf"))(tensors)
    with pytest.raises(WeightLoadError, match="weight_scale_inv: found 1 NaN or infinite"):
        decoded(layer, tensors)
    decoded(layer, tensors, Region(0, 24, 0, 64))
