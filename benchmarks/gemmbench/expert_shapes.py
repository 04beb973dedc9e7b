"""Experts of real models by name, as in their config.json, and what one rank holds of them."""

from dataclasses import dataclass

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class ExpertsShape:
    """Experts of one layer on one rank.

    `count` of `all_experts` are here, each of two matrices `[inner, hidden]` and one of
    `[hidden, inner]` in groups of `group_size`; each token asks `top_k`.
    """

    hidden: int
    inner: int
    count: int
    top_k: int
    group_size: int = 128
    all_experts: int = 0

    def on_rank(self, tp: int, ep: int) -> "ExpertsShape":
        """What the first rank holds. Raises ValueError where a size divides a number unevenly."""
        for name, number, size in (("inner", self.inner, tp), ("experts", self.count, ep)):
            if number % size:
                raise ValueError(f"{number} {name} are not divisible by {size} ranks")
        sizes = (self.hidden, self.inner // tp, self.count // ep, self.top_k, self.group_size)
        return ExpertsShape(*sizes, self.count)


MODELS = {
    "mixtral-8x7b": ExpertsShape(4096, 14336, 8, 2),
    "qwen3-30b-a3b": ExpertsShape(2048, 768, 128, 8),
    "qwen3-235b-a22b": ExpertsShape(4096, 1536, 128, 8),
    "glm-4.5-air": ExpertsShape(4096, 1408, 128, 8),
    "kimi-k2": ExpertsShape(7168, 2048, 384, 8, group_size=32),
    "dry-run": ExpertsShape(256, 128, 6, 2, group_size=64),
}
