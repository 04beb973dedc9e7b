"""Clients of a soak: they ask, read in streams or at once, and hang up when they are told to."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import httpx

from soaking.asks import Ask, Sent

SECONDS_PER_REQUEST = 180.0
PATH = "/v1/completions"


class Fate(Enum):
    """What became of a request."""

    ANSWERED = "answered"
    CANCELLED = "cancelled"
    LOST = "lost"


@dataclass(slots=True)
class Answer:
    """Tokens with their log-probabilities in nats, as far as the client read; why, where lost."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    fate: Fate = Fate.ANSWERED
    detail: str = ""

    def take(self, choice: dict) -> None:
        """Add what a response or a chunk of one says."""
        self.tokens += choice.get("token_ids") or []
        self.logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []


class Clients:
    """As many at once as `concurrency`, on connections of their own."""

    def __init__(self, url: str, concurrency: int) -> None:
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._http = httpx.AsyncClient(base_url=url, timeout=SECONDS_PER_REQUEST, limits=limits)
        self._concurrency = concurrency
        self.stopped = False
        # Of a token under the load of the moment: tells clients of whole answers when to hang up
        self._seconds_per_token = 0.05

    async def __aenter__(self) -> "Clients":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def alone(self, asks: list[Ask]) -> dict[Ask, Answer]:
        """The answer to each ask with no other request in the server."""
        return {ask: await self.send(Sent(ask, False, None, None)) for ask in asks}

    async def under_load(
        self, sent: Iterator[Sent], requests: int, seconds: float
    ) -> list[tuple[Sent, Answer]]:
        """Send until `seconds` have passed and `requests` were sent, or this is `stopped`; every
        answer, in the order in which they ended."""
        end = time.monotonic() + seconds
        answers: list[tuple[Sent, Answer]] = []
        begun = 0

        async def client() -> None:
            nonlocal begun
            while not self.stopped and (begun < requests or time.monotonic() < end):
                begun += 1
                each = next(sent)
                answers.append((each, await self.send(each)))

        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(client())
        return answers

    async def send(self, sent: Sent) -> Answer:
        """One request; what goes wrong is a lost one, not an exception."""
        answer = Answer()
        try:
            await (self._stream if sent.stream else self._whole)(sent, answer)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            answer.fate, answer.detail = Fate.LOST, f"{type(error).__name__}: {error}"[:300]
        if answer.fate is Fate.ANSWERED and len(answer.tokens) != sent.ask.max_tokens:
            answer.fate = Fate.LOST
            answer.detail = f"{len(answer.tokens)} of {sent.ask.max_tokens} tokens"
        return answer

    async def _whole(self, sent: Sent, answer: Answer) -> None:
        start = time.monotonic()
        patience = None
        if sent.give_up is not None:
            patience = sent.give_up * sent.ask.max_tokens * self._seconds_per_token
        try:
            async with asyncio.timeout(patience):
                response = await self._http.post(PATH, json=sent.body())
        except TimeoutError:
            answer.fate = Fate.CANCELLED
            return
        response.raise_for_status()
        answer.take(response.json()["choices"][0])
        self._seconds_per_token = (time.monotonic() - start) / sent.ask.max_tokens

    async def _stream(self, sent: Sent, answer: Answer) -> None:
        wanted = sent.ask.max_tokens
        enough = wanted if sent.give_up is None else max(1, int(sent.give_up * wanted))
        async with self._http.stream("POST", PATH, json=sent.body()) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise ValueError(chunk["error"])
                answer.take(chunk["choices"][0])
                if sent.give_up is not None and enough <= len(answer.tokens) < wanted:
                    answer.fate = Fate.CANCELLED
                    return

    async def in_flight(self) -> float:
        """Requests that the engine runs or keeps waiting, by its metrics."""
        text = (await self._http.get("/metrics")).text
        names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return sum(float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if x.startswith(names))

    async def drained(self, seconds: float = 30) -> str | None:
        """What is wrong, unless the engine forgets every request, also those that were given up."""
        end = time.monotonic() + seconds
        try:
            while left := await self.in_flight():
                if time.monotonic() > end:
                    return f"the engine still holds {left:.0f} requests that no client waits for"
                await asyncio.sleep(0.2)
        except httpx.HTTPError as error:
            return f"the server does not answer: {type(error).__name__}: {error}"
        return None
