"""NVFP4 and MXFP4: the tensors against compressed-tensors' own code, ModelOpt's configs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import ALL_BUILDS, FLOAT4_BUILDS, add, write_checkpoint, write_json
from float4_models import compressed, decompressed, exact
from fusedq_kernels import reference
from fusedq_kernels.choose.device import cpu_device
from layers import MODULE, check, describe
from tiny_models import asset
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import PreflightError, UnsupportedCheckpoint, WeightLoadError
from vllm_fusedq.formats import LayerFormat, Region, format_for
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model

KINDS = {"nvfp4": "ct-nvfp4", "mxfp4": "ct-mxfp4"}
TARGET = Target(cpu_device(), torch.bfloat16)
DOWN = "model.layers.0.mlp.down_proj"


def real_weight() -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(asset("tiny-llama-bf16") / "model.safetensors")[f"{DOWN}.weight"]


@pytest.mark.parametrize("bounds", [(0, 8, 0, 16), (3, 40, 16, 80), (5, 6, 48, 112), (0, 40, 7, 9)])
@pytest.mark.parametrize("build", FLOAT4_BUILDS)
def test_regions(build: str, bounds: tuple[int, int, int, int]) -> None:
    truth = FLOAT4_BUILDS[build].truth(40, 112, 0)
    layer, tensors = describe(build, truth, 0)
    check(layer, tensors, Region(*bounds), truth)


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_compressed_tensors_on_a_real_weight(kind: str) -> None:
    """Codes and block scales bit for bit; weights as the library rounds them to bf16.

    It divides each block's scale by the scale of all in fp32, where we divide once: the last bit
    of fp32 may differ before both are rounded.
    """
    tensors = compressed(real_weight(), kind)
    layer, _ = describe(KINDS[kind], None, 0, tensors)
    logical = layer.packing.logical(tensors, layer, layer.whole)
    found, wanted = reference.dequantize(logical), exact(tensors, kind)
    assert torch.allclose(found.double(), wanted, rtol=2**-22, atol=0)
    theirs = decompressed(tensors, kind)
    unequal = found.bfloat16() != theirs
    assert unequal.float().mean() < 1e-3
    assert torch.allclose(found, theirs.float(), rtol=2**-8, atol=0)
    if kind == "mxfp4":
        assert not unequal.any()


def test_a_scale_of_all_that_is_stored_inverted() -> None:
    truth = FLOAT4_BUILDS["ct-nvfp4"].truth(16, 64, 0)
    for build in ("ct-nvfp4", "modelopt-nvfp4"):
        layer, tensors = describe(build, truth, 0)
        logical = layer.packing.logical(tensors, layer, layer.whole)
        assert torch.equal(logical.row_scales, torch.full((16,), truth.scale_of_all))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("build", "name"), [("ct-nvfp4", "weight_global_scale"), ("modelopt-nvfp4", "weight_scale_2")]
)
def test_refuses_a_scale_of_all_that_is_none(build: str, name: str, value: float) -> None:
    layer, tensors = describe(build, FLOAT4_BUILDS[build].truth(16, 64, 0), 0)
    tensors[name] = torch.full_like(tensors[name], value)
    with pytest.raises(WeightLoadError, match=rf"{MODULE}.{name}: found .*, expected a positive"):
        layer.packing.logical(tensors, layer, layer.whole)


@pytest.mark.parametrize(("build", "stored"), [("ct-nvfp4", 0x7F), ("ct-mxfp4", 0xFF)])
def test_refuses_block_scales_that_are_no_numbers(build: str, stored: int) -> None:
    layer, tensors = describe(build, FLOAT4_BUILDS[build].truth(16, 64, 0), 0)
    tensors["weight_scale"].view(torch.uint8)[1, 1] = stored
    with pytest.raises(WeightLoadError, match="weight_scale: found 1 NaN or infinite values"):
        layer.packing.logical(tensors, layer, layer.whole)


def modelopt(path: Path, **config: Any) -> Any:
    write_checkpoint(path, "modelopt-nvfp4", config=config)
    return format_for(read_checkpoint(path))


def layer_of(path: Path, **config: Any) -> LayerFormat | None:
    return modelopt(path, **config).layer_of(DOWN)


def test_modelopt_in_hf_quant_config_json(tmp_path: Path) -> None:
    import json

    write_checkpoint(tmp_path, "modelopt-nvfp4")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    write_json(tmp_path / "config.json", config)
    quantization = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head", "model.layers.0.self_attn*"],
    }
    document = {"producer": {"name": "modelopt"}, "quantization": quantization}
    write_json(tmp_path / "hf_quant_config.json", document)
    fmt = format_for(read_checkpoint(tmp_path))
    assert fmt.name == "modelopt"
    layer = fmt.layer_of(DOWN)
    assert layer.activations == "4-bit float"
    assert fmt.kv_cache_scheme["num_bits"] == 8
    with pytest.raises(PreflightError, match="although the config leaves this module unquantized"):
        fmt.layer_of("model.layers.0.self_attn.q_proj")


def test_modelopt_quantizes_activations_where_it_says_so(tmp_path: Path) -> None:
    assert layer_of(tmp_path / "a").activations == ""
    assert layer_of(tmp_path / "b", quant_algo="NVFP4").activations == "4-bit float"
    weights_alone = {"group_0": {"weights": {}, "input_activations": None}}
    layer = layer_of(tmp_path / "c", quant_algo="nvfp4", config_groups=weights_alone)
    assert layer.activations == ""


def test_modelopt_mixed_precision(tmp_path: Path) -> None:
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"]
    names += [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
    listed = {name: {"quant_algo": "W4A16_NVFP4", "group_size": 16} for name in names}
    mixed = {"quant_algo": "MIXED_PRECISION"}
    fmt = modelopt(
        tmp_path / "a", quantized_layers=listed | {DOWN: {"quant_algo": "NVFP4"}}, **mixed
    )
    assert fmt.layer_of(DOWN).activations == "4-bit float"
    assert fmt.layer_of(names[0]).activations == ""
    other = modelopt(
        tmp_path / "b", quantized_layers=listed | {DOWN: {"quant_algo": "INT9"}}, **mixed
    )
    with pytest.raises(PreflightError, match="found quant_algo INT9; supported: NVFP4, W4A16"):
        other.layer_of(DOWN)
    less = modelopt(tmp_path / "c", quantized_layers=listed, **mixed)
    with pytest.raises(PreflightError, match="although the config leaves this module unquantized"):
        less.layer_of(DOWN)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_algo": "NVFP4_AWQ"},
            "quant_algo 'NVFP4_AWQ'; supported by modelopt: quant_algo N",
        ),
        ({"quant_algo": None}, "quant_algo None"),
        ({"group_size": 32}, "group_size 32; supported by modelopt: group_size 16"),
        ({"quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION with quantized_layers {}"),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": 3}},
            "3 in quantized_layers of a; supported by modelopt: a quant_algo",
        ),
        ({"kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo 'NVFP4'; supported by modelopt: k"),
    ],
)
def test_modelopt_refuses_by_name(tmp_path: Path, config: dict, message: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=message):
        modelopt(tmp_path, **config)


@pytest.mark.parametrize("change", [{"group_size": 32}, {"symmetric": False}, {"num_bits": 8}])
def test_compressed_tensors_refuses_other_floats(change: dict[str, Any], tmp_path: Path) -> None:
    config = ALL_BUILDS["ct-nvfp4"].config(16)
    config["config_groups"]["group_0"]["weights"] |= change
    write_checkpoint(tmp_path, "ct-nvfp4", config=config)
    with pytest.raises(
        UnsupportedCheckpoint, match=r"nvfp4-pack-quantized with .* static symmetric"
    ):
        format_for(read_checkpoint(tmp_path))


@pytest.mark.parametrize("build", ["ct-nvfp4", "ct-mxfp4"])
def test_compressed_tensors_refuses_an_order_that_is_stored_nowhere(
    build: str, tmp_path: Path
) -> None:
    config = ALL_BUILDS[build].config(16)
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    write_checkpoint(tmp_path, build, config=config)
    with pytest.raises(UnsupportedCheckpoint, match="4-pack-quantized with actorder 'group' in"):
        format_for(read_checkpoint(tmp_path))


def test_static_scales_of_activations_are_loaded_and_not_looked_at(tmp_path: Path) -> None:
    edits = [add(f"{DOWN}.input_scale", torch.tensor(float("nan")))]
    write_checkpoint(tmp_path, "modelopt-nvfp4", edits=edits)
    (plan,) = (
        plan for plan in plan_model(read_checkpoint(tmp_path), TARGET).layers if plan.prefix == DOWN
    )
    assert plan.formats[0].tensor("input_scale") is not None
    assert plan.bits_per_weight >= 5
