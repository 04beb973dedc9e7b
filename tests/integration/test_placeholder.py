"""What a layer's placeholders answer to vLLM's loading code, and which layers are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import write_checkpoint
from loading import plans_of
from vllm_configs import current_config
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import PreflightError, WeightLoadError
from vllm_fusedq.load.loader import LayerLoader

MODULE = "model.layers.0.self_attn.o_proj"
ATTRIBUTES = ("output_dim", "input_dim", "packed_dim", "packed_factor")


@pytest.fixture
def placeholder(tmp_path: Path) -> Callable[..., torch.nn.Parameter]:
    """Makes the placeholder of the qweight of a layer."""
    from vllm_fusedq.integration.placeholder import Placeholder, WeightLoader

    write_checkpoint(tmp_path, "gptq-sym", hidden=64, intermediate=96)
    plan = next(p for p in plans_of(read_checkpoint(tmp_path), "cpu") if "o_proj" in p.prefix)
    device = torch.device("cpu")
    loader = LayerLoader.create(plan, torch.float16, device)

    def make(reordered: bool = False) -> torch.nn.Parameter:
        return Placeholder(
            torch.int32, device, WeightLoader(loader, "qweight", reordered=reordered)
        )

    return make


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_model_code_that_asks_for_a_layout_is_refused(
    placeholder: Callable[..., torch.nn.Parameter], attribute: str
) -> None:
    """Falcon's code asks by `getattr(param, "output_dim", None)` and reorders where it is set."""
    message = f"{MODULE}.qweight: found vLLM's code for this model asking for the {attribute}"
    with pytest.raises(WeightLoadError, match=message) as error:
        getattr(placeholder(), attribute, None)
    assert "docs/models.md" in str(error.value)
    with pytest.raises(WeightLoadError, match=message):
        hasattr(placeholder(), attribute)


def test_a_layer_that_follows_the_order_by_itself_has_no_layout_to_reorder_by(
    placeholder: Callable[..., torch.nn.Parameter],
) -> None:
    assert getattr(placeholder(reordered=True), "output_dim", None) is None


def test_nothing_is_refused_once_the_layer_is_loaded(
    tmp_path: Path, placeholder: Callable[..., torch.nn.Parameter]
) -> None:
    parameter = placeholder()
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        module, _, suffix = name.rpartition(".")
        if module == MODULE:
            parameter.weight_loader.loader.add(suffix, tensor)
    assert getattr(parameter, "output_dim", None) is None


def test_vllms_mixer_finds_the_weight_whose_loader_it_sets(
    placeholder: Callable[..., torch.nn.Parameter],
) -> None:
    """As the mixer of vLLM 0.26 to 0.31 does it, whatever the format."""
    from vllm.model_executor.utils import set_weight_attrs

    from vllm_fusedq.integration.placeholder import expect_another_loader

    layer, parameter = torch.nn.Module(), placeholder()
    layer.register_parameter("qweight", parameter)
    own = parameter.weight_loader
    restore = expect_another_loader(layer)
    for tensor in (layer.weight, parameter):
        delattr(tensor, "weight_loader")
        set_weight_attrs(tensor, {"weight_loader": print})
    restore()
    assert not hasattr(layer, "weight")
    assert parameter.weight_loader is own


def test_vllms_reload_takes_placeholders_apart_and_together(
    placeholder: Callable[..., torch.nn.Parameter],
) -> None:
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor, to_meta_tensor

    parameter = placeholder()
    again = materialize_meta_tensor(to_meta_tensor(parameter))
    assert type(again) is type(parameter)
    assert again.weight_loader is parameter.weight_loader
    assert isinstance(again, torch.nn.Parameter)


def test_a_layer_with_a_loader_of_its_own_is_refused() -> None:
    from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear

    from vllm_fusedq.integration.placeholder import check_layer_class

    class Shuffled(MergedColumnParallelLinear):
        def weight_loader(self, *_: object) -> None: ...

    class Renamed(ColumnParallelLinear): ...

    with current_config(), torch.device("meta"):
        layers = [torch.nn.Module.__new__(each) for each in (Shuffled, Renamed)]
    message = "gate_up: found a quantized Shuffled, a layer with a weight_loader of its own"
    with pytest.raises(PreflightError, match=message):
        check_layer_class(layers[0], "gate_up")
    check_layer_class(layers[1], "gate_up")
