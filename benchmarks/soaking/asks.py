"""The requests of a soak: drawn from a seed, so that a failure is met again."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MODEL = "tiny"
# Tiny checkpoints know 512 tokens; the first of them are special.
TOKENS = range(3, 500)
PROMPT_TOKENS = (3, 17, 64, 129, 200, 330)
OUTPUT_TOKENS = (4, 24, 64, 120)
MODEL_LENGTH = 512
CANCELLED_SHARE = 1 / 3


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked: token ids, the tokens to generate, a seed where they are sampled."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int | None = None

    def body(self) -> dict[str, Any]:
        """Of `POST /v1/completions`."""
        sampling = {"temperature": 0.8, "top_p": 0.95, "seed": self.seed}
        return {
            "model": MODEL,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "logprobs": 1,
            "return_token_ids": True,
            **({"temperature": 0} if self.seed is None else sampling),
        }


@dataclass(frozen=True, slots=True)
class Sent:
    """An ask under load: in a stream or whole, given up after a share of its tokens (None: never).

    One with a `salt` finds nothing in the prefix cache.
    """

    ask: Ask
    stream: bool
    give_up: float | None
    salt: str | None

    def body(self) -> dict[str, Any]:
        salt = {} if self.salt is None else {"cache_salt": self.salt}
        return self.ask.body() | {"stream": self.stream} | salt


def pool(seed: int, count: int) -> list[Ask]:
    """Prompts of all lengths for answers of all lengths, every other one sampled."""
    rng = random.Random(seed)
    return [
        Ask(
            tuple(rng.choices(TOKENS, k=rng.choice(PROMPT_TOKENS))),
            rng.choice(OUTPUT_TOKENS),
            rng.randrange(1 << 31) if i % 2 else None,
        )
        for i in range(count)
    ]


def load(seed: int, asks: list[Ask]) -> Iterator[Sent]:
    """Without end: asks in random order, half of them streamed, half salted, a third given up."""
    rng = random.Random(seed)
    while True:
        yield Sent(
            ask=rng.choice(asks),
            stream=rng.random() < 0.5,
            give_up=rng.uniform(0.1, 0.9) if rng.random() < CANCELLED_SHARE else None,
            salt=str(rng.getrandbits(64)) if rng.random() < 0.5 else None,
        )
