"""Tiny mixtures of experts from known codes, scales and zeros, stored expert by expert."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoints import ALL_BUILDS, Edit, Tensors, Truth, write_json
from fusedq_kernels.layouts.packing import unpack
from fusedq_kernels.types import StackedWeight
from vllm_fusedq.load.experts import ExpertsLoader

HIDDEN, INNER, COUNT, GROUP = 64, 96, 4, 32
NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Mixture:
    """What the modules of a checkpoint are worth, by name."""

    truths: dict[str, Truth]
    stack: str = "model.layers.0.mlp.experts"

    def expert(self, number: int) -> list[Truth]:
        """Gate, up and down."""
        return [self.truths[f"{self.stack}.{number}.{name}"] for name in NAMES]


def write_mixture(
    path: Path,
    build: str = "awq",
    *,
    layers: int = 1,
    count: int = COUNT,
    hidden: int = HIDDEN,
    inner: int = INNER,
    group_size: int = GROUP,
    config: dict[str, object] | None = None,
    edits: Iterable[Edit] = (),
) -> Mixture:
    """Write a Qwen3-MoE-like checkpoint of experts, an attention layer and unquantized routers.

    `config` overrides entries of the quantization config, `edits` change the tensors, by their full
    names, before they are written.
    """
    made = ALL_BUILDS[build]
    tensors: Tensors = {}
    truths: dict[str, Truth] = {}

    def add(module: str, n: int, k: int) -> None:
        truths[module] = made.truth(n, k, group_size, seed=len(truths))
        for suffix, tensor in made.tensors(truths[module]).items():
            tensors[f"{module}.{suffix}"] = tensor

    for layer in range(layers):
        block = f"model.layers.{layer}"
        add(f"{block}.self_attn.o_proj", hidden, hidden)
        tensors[f"{block}.mlp.gate.weight"] = torch.zeros(count, hidden, dtype=torch.float16)
        for number in range(count):
            for name in NAMES:
                size = (hidden, inner) if name == "down_proj" else (inner, hidden)
                add(f"{block}.mlp.experts.{number}.{name}", *size)
    for edit in edits:
        edit(tensors)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    document = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "moe_intermediate_size": inner,
        "num_experts": count,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "torch_dtype": "float16",
        "quantization_config": {**made.config(group_size), **(config or {})},
    }
    write_json(path / "config.json", document)
    return Mixture(truths)


def stacked(
    gate_up: str = "gate_up_proj", down: str = "down_proj", after: str = "."
) -> Callable[[Tensors], None]:
    """An edit that stores all experts of a layer at once, gates before ups.

    `after` is what follows the name of a part: "." for `gate_up_proj.weight_scale`, "_" for
    `gate_up_proj_scale`.
    """

    def edit(tensors: Tensors) -> None:
        found: dict[tuple[str, str], dict[tuple[int, str], torch.Tensor]] = defaultdict(dict)
        for name in [name for name in tensors if ".experts." in name]:
            layer, _, rest = name.partition(".experts.")
            number, module, suffix = rest.split(".", 2)
            found[layer, suffix][int(number), module] = tensors.pop(name)
        for (layer, suffix), each in found.items():
            count = len(each) // 3
            pairs = [[each[e, "gate_proj"], each[e, "up_proj"]] for e in range(count)]
            ups = [torch.cat(pair) if pair[0].ndim else torch.stack(pair) for pair in pairs]
            downs = [each[e, "down_proj"] for e in range(count)]
            own = suffix if after == "." else suffix.removeprefix("weight_")
            end = "" if suffix == "weight" and after == "_" else f"{after}{own}"
            tensors[f"{layer}.experts.{gate_up}{end}"] = torch.stack(ups)
            tensors[f"{layer}.experts.{down}{end}"] = torch.stack(downs)

    return edit


def worth(packed: StackedWeight, place: int) -> torch.Tensor:
    """fp64 `[N, K]` of one expert, features in the order of the model."""
    logical = unpack(packed.expert(place))
    groups = (torch.arange(packed.k) + packed.phase) // packed.spec.group_size
    scales = logical.scales.double()[:, groups]
    codes = logical.codes.double()
    if (table := packed.spec.weight_type.codebook) is not None:
        values = torch.tensor(table, dtype=torch.float32)[logical.codes.long()].double() * scales
        return values if logical.row_scales is None else values * logical.row_scales[:, None]
    zeros = packed.spec.weight_type.bias if logical.zeros is None else logical.zeros[:, groups]
    values = (codes - zeros) * scales
    if logical.perm is None:
        return values
    placed = values.new_zeros((packed.n, packed.in_features))
    return placed.index_add_(1, logical.perm.long(), values)


def assert_holds(
    loaders: list[ExpertsLoader], mixture: Mixture, inner: tuple[int, int] = (0, INNER)
) -> None:
    """Gate and up row by row in turn of 8; down's columns of the rank."""
    w13, w2 = loaders
    for place, number in enumerate(w13.plan.experts):
        gate, up, down = mixture.expert(number)
        found = worth(w13.packed, place)
        rows = [
            each.values(row, row + 1, 0, each.codes.shape[1])[0]
            for start in range(*inner, 8)
            for each in (gate, up)
            for row in range(start, start + 8)
        ]
        torch.testing.assert_close(found, torch.stack(rows), rtol=1e-6, atol=0)
        expected = down.values(0, down.codes.shape[0], *inner)
        torch.testing.assert_close(worth(w2.packed, place), expected, rtol=1e-6, atol=0)
