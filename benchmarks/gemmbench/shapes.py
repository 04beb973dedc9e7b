"""Linear layers of real models by name and tensor-parallel size, as in their config.json."""

from collections.abc import Iterable
from dataclasses import dataclass

DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64)
PREFILL_TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like decoder; `qkv_bias` as in Qwen2.

    Where there are `num_experts`, `intermediate` is of one of them and a token asks `top_k`.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocab: int = 32000
    qkv_bias: bool = False
    model_type: str = "llama"
    num_experts: int = 0
    top_k: int = 0

    def linears(self, tp: int = 1) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) that one of `tp` ranks holds, as vLLM fuses the layers.

        Raises ValueError where `tp` divides a size unevenly, or there are experts.
        """
        if self.num_experts:
            raise ValueError("a mixture of experts has no fused gate_up_proj and down_proj")
        for name, size in (("heads", self.heads), ("intermediate", self.intermediate)):
            if size % tp:
                raise ValueError(f"{name} {size} is not divisible by tensor-parallel size {tp}")
        heads = self.heads // tp
        kv_heads = max(1, self.kv_heads // tp)
        return {
            "qkv_proj": ((heads + 2 * kv_heads) * self.head_dim, self.hidden),
            "o_proj": (self.hidden, heads * self.head_dim),
            "gate_up_proj": (2 * self.intermediate // tp, self.hidden),
            "down_proj": (self.hidden, self.intermediate // tp),
        }

    def unfused_linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each module below a block, as checkpoints name it."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        mlps = [f"mlp.experts.{number}" for number in range(self.num_experts)] or ["mlp"]
        sizes = {
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            **{f"{mlp}.{name}": size for mlp in mlps for name, size in sizes.items()},
        }


def _qwen2(*sizes: int) -> ModelShape:
    return ModelShape(*sizes, vocab=152064, qkv_bias=True, model_type="qwen2")


def _qwen3(*sizes: int) -> ModelShape:
    return ModelShape(*sizes, vocab=151936, model_type="qwen3")


MODELS: dict[str, ModelShape] = {
    "llama-3-8b": ModelShape(4096, 14336, 32, 32, 8, vocab=128256),
    "llama-3-70b": ModelShape(8192, 28672, 80, 64, 8, vocab=128256),
    "mistral-7b": ModelShape(4096, 14336, 32, 32, 8, vocab=32768),
    "mistral-small-24b": ModelShape(5120, 32768, 40, 32, 8, vocab=131072),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8),
}
# Unfused shapes of other benchmarks, (out_features, in_features): Tiny-GEMM's own list, and the
# sizes for which others have published times on an H200.
LISTS: dict[str, dict[str, tuple[int, int]]] = {
    "tiny-gemm": {
        "q_proj": (4096, 4096),
        "kv_proj": (1024, 4096),
        "up_proj": (14336, 4096),
        "down_proj": (4096, 14336),
    },
    "published": {
        "8192x8192": (8192, 8192),
        "16384x8192": (16384, 8192),
        "20480x7168": (20480, 7168),
        "81920x8192": (81920, 8192),
    },
    "dry-run": {"square": (128, 256), "wide": (256, 128)},
}


def named_shapes(names: Iterable[str], tps: Iterable[int]) -> dict[tuple[int, int], list[str]]:
    """Each distinct (out_features, in_features) with every layer that has it, "model/tp/layer".

    `names` are keys of `MODELS` and `LISTS`; a list has no tensor-parallel variants. Raises
    ValueError for an unknown name, naming the known ones.
    """
    found: dict[tuple[int, int], list[str]] = {}
    for name in names:
        if name in LISTS:
            for layer, shape in LISTS[name].items():
                found.setdefault(shape, []).append(f"{name}/{layer}")
        elif name in MODELS:
            for tp in tps:
                for layer, shape in MODELS[name].linears(tp).items():
                    found.setdefault(shape, []).append(f"{name}/tp{tp}/{layer}")
        else:
            raise ValueError(f"unknown shapes {name!r}; known: {', '.join((*MODELS, *LISTS))}")
    return found
