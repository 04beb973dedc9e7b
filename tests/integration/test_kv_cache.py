"""vLLM's attention layers and the scales of a checkpoint: names, bits, what is refused late."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import add, write_checkpoint
from fusedq_kernels.choose.device import cpu_device
from kv_scales import SCHEME, SPELLINGS, kv_scales
from vllm_configs import current_config
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import PreflightError, WeightLoadError
from vllm_fusedq.formats import format_for
from vllm_fusedq.plan.kv_cache import scaled_attention
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.settings import Settings
from vllm_fusedq.worker.state import WorkerState

ATTENTION = "model.layers.0.self_attn"
LAYER = f"{ATTENTION}.attn"
# Neither is a bfloat16, nor a float16
PAIR = (0.0275438321, 0.0286485510)


def config_for(path: Path, *edits: Any, **options: Any) -> Any:
    from vllm_fusedq.integration.config import FusedQConfig

    write_checkpoint(path, edits=edits, **options)
    config = FusedQConfig()
    config.format = format_for(read_checkpoint(path))
    config.worker = WorkerState(Target(cpu_device(), torch.bfloat16), Settings())
    return config


def attention(config: Any, kv_cache_dtype: str) -> Any:
    """What vLLM's layer of a bfloat16 model is, as far as its KV cache is concerned."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention.attention import _init_kv_cache_quant

    layer = Attention.__new__(Attention)
    torch.nn.Module.__init__(layer)
    layer.kv_cache_dtype, layer.calculate_kv_scales = kv_cache_dtype, False
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with current_config():
            _init_kv_cache_quant(layer, config, LAYER)
    finally:
        torch.set_default_dtype(default)
    return layer


def load(layer: Any, **values: torch.Tensor) -> None:
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    for name, value in values.items():
        parameter = getattr(layer, name)
        getattr(parameter, "weight_loader", default_weight_loader)(parameter, value)
    layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_vllm_loads_every_spelling_where_we_expect_it(spelling: str, tmp_path: Path) -> None:
    config = config_for(tmp_path, kv_scales(PAIR, spelling=spelling))
    mapper = config.get_cache_scale_mapper()
    (parts,) = config.format.kv_tensors.values()
    expected = {info.name: f"{LAYER}.{part}" for part, (info,) in parts.items()}
    if spelling == "shared":
        expected = dict.fromkeys(expected, f"{LAYER}.k_scale")
    assert dict(zip(expected, mapper.apply_list(list(expected)), strict=True)) == expected
    assert set(expected) == {f"model.layers.0.{name}" for name in SPELLINGS[spelling]}


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_scales_arrive_bit_for_bit(kv_cache_dtype: str, tmp_path: Path) -> None:
    layer = attention(config_for(tmp_path, kv_scales(PAIR)), kv_cache_dtype)
    stored = torch.tensor(PAIR, dtype=torch.float32)
    load(layer, k_scale=stored[:1], v_scale=stored[1:])
    applied = stored if kv_cache_dtype == "fp8" else torch.ones(2)
    assert torch.equal(torch.stack([layer._k_scale, layer._v_scale]), applied)
    assert [layer._k_scale_float, layer._v_scale_float] == applied.tolist()
    assert not list(layer.named_parameters())
    layer.quant_method.process_weights_after_loading(layer)


def test_one_scale_for_both(tmp_path: Path) -> None:
    layer = attention(config_for(tmp_path, kv_scales(PAIR, spelling="shared")), "fp8")
    load(layer, k_scale=torch.tensor(PAIR[0]))
    assert layer._k_scale_float == layer._v_scale_float == torch.tensor(PAIR[0]).item()


def test_vllm_is_told_of_a_scheme_alone(tmp_path: Path) -> None:
    """`Attention` makes "auto" fp8 where its quantization config has a kv_cache_scheme."""
    edit = kv_scales(PAIR)
    config = config_for(tmp_path / "a", edit, build="ct-sym", config={"kv_cache_scheme": SCHEME})
    assert config.kv_cache_scheme == SCHEME
    assert config_for(tmp_path / "b", edit).kv_cache_scheme is None
    assert type(config)().kv_cache_scheme is None
    config.worker.draft = True
    assert config.kv_cache_scheme is None, "the cache would change under the target's layers"


def test_a_model_that_renames_its_modules(tmp_path: Path) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    config = config_for(tmp_path, kv_scales(PAIR, spelling="modelopt"))
    mapper = WeightsMapper(orig_to_new_prefix={"model.layers.": "decoder.blocks."})
    config.apply_vllm_mapper(mapper)
    prefix = "decoder.blocks.0.self_attn.attn"
    assert scaled_attention(prefix, config.format, config.renamed_modules) == ATTENTION


def test_without_scales_the_cache_is_left_to_vllm(tmp_path: Path) -> None:
    assert not hasattr(attention(config_for(tmp_path), "fp8_e5m2"), "quant_method")


@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e5m2", "nvfp4"])
def test_another_cache_than_the_scales_are_for(kv_cache_dtype: str, tmp_path: Path) -> None:
    config = config_for(tmp_path, kv_scales(PAIR))
    with pytest.raises(PreflightError, match=f"found --kv-cache-dtype {kv_cache_dtype} beside"):
        attention(config, kv_cache_dtype)


@pytest.mark.parametrize(
    ("value", "found"),
    [(0.0, "scale 0,"), (-0.5, "scale -0.5,"), (float("nan"), "scale nan,"), (3e39, "scale inf,")],
)
def test_a_value_that_is_no_scale(value: float, found: str, tmp_path: Path) -> None:
    layer = attention(config_for(tmp_path, kv_scales(PAIR)), "fp8")
    message = f"{ATTENTION}.v_scale: found the {found} expected a positive number; quantize"
    with pytest.raises(WeightLoadError, match=message):
        load(layer, k_scale=torch.tensor(PAIR[0]), v_scale=torch.tensor(value))


def test_a_scale_that_never_arrives(tmp_path: Path) -> None:
    layer = attention(config_for(tmp_path, kv_scales(PAIR)), "fp8")
    message = f"{ATTENTION}.k_scale: found no value after loading, expected the file's; vLLM's code"
    with pytest.raises(WeightLoadError, match=message):
        load(layer, v_scale=torch.tensor(PAIR[1]))


@pytest.mark.parametrize("zero", [0, 3])
def test_zero_points_of_a_symmetric_scheme_are_zero(zero: int, tmp_path: Path) -> None:
    zeros = [add(f"{ATTENTION}.{part}_zero_point", torch.zeros(1).to(torch.int8)) for part in "kv"]
    layer = attention(config_for(tmp_path, kv_scales(PAIR), *zeros), "fp8")
    point = torch.tensor([zero], dtype=torch.int8)
    scales = {name: torch.tensor(PAIR[0]) for name in ("k_scale", "v_scale")}
    if zero == 0:
        load(layer, **scales, k_zero_point=point, v_zero_point=point)
        assert not list(layer.named_parameters())
        return
    with pytest.raises(WeightLoadError, match="k_zero_point: found the zero point 3, expected 0"):
        load(layer, **scales, k_zero_point=point)
