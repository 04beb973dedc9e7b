"""The two halves of a soak: load on one server, kills of many."""

import asyncio
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local_server import Server, ServerDied, launch, wait_until_healthy
from soaking import asks
from soaking.client import Answer, Clients
from soaking.kills import COMPILER_SECONDS, GONE_SECONDS, Kill, left_behind, strike, wait_for
from soaking.memory import Sampler, slope
from soaking.processes import Watch
from soaking.verdict import compare, counts, difference

POOL = 96
LOG_SHOWN = 6000
# Seconds for a server to get so far, on a busy machine too
PATIENCE = 600


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked: at least `requests`, for at least `seconds`, `concurrency` at a time."""

    requests: int
    concurrency: int
    seconds: float
    seed: int
    tolerance: float = 0.0
    pool: int = POOL


async def soak(server: Server, load: Load) -> dict[str, Any]:
    """Ask alone, then under load, then alone again; what was found, `problems` among it."""
    asked = asks.pool(load.seed, load.pool)
    async with Clients(server.url, load.concurrency) as clients:
        alone = await clients.alone(asked)
        memory = Sampler(server.process.pid)
        memory.start()
        try:
            answers = await clients.under_load(
                asks.load(load.seed, asked), load.requests, load.seconds
            )
            undrained = await clients.drained()
        finally:
            samples = memory.stop()
        again = await clients.alone(asked)
    later = [(asks.Sent(ask, False, None, None), answer) for ask, answer in again.items()]
    lost, wrong, ties = compare([*answers, *later], alone, load.tolerance)
    problems = [f"lost: {each}" for each in lost] + [f"wrong: {each}" for each in wrong]
    if undrained:
        problems.append(undrained)
    if (code := server.process.poll()) is not None:
        problems.append(f"the server ended by itself, exit code {code}:\n{server.log[-LOG_SHOWN:]}")
    minutes = samples[-1][0] / 60
    return {
        "requests": counts(answers) | {"lost": len(lost), "wrong": len(wrong), "ties": ties},
        "memory": {
            "slope_mb_per_minute": round(slope(samples), 2),
            "requests_per_minute": round(len(answers) / minutes),
            "first_mb": round(samples[0][1] / 1e6),
            "last_mb": round(samples[-1][1] / 1e6),
            "samples": [
                (round(at), round(size / 1e6, 1)) for at, size in samples[:: _every(samples)]
            ],
        },
        "problems": problems,
    }


def _every(samples: list, shown: int = 20) -> int:
    return max(1, len(samples) // shown)


@dataclass(frozen=True, slots=True)
class Home:
    """Where a server writes, all in one folder: caches stay, `temporary` is to be empty."""

    folder: Path

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def environment(self) -> dict[str, str]:
        self.temporary.mkdir(parents=True, exist_ok=True)
        return {
            "TMPDIR": str(self.temporary),
            "XDG_CACHE_HOME": str(self.cache),
            "VLLM_CACHE_ROOT": str(self.cache / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "torchinductor"),
        }

    def partial_libraries(self) -> list[Path]:
        """What a compiler is writing, or was when it was killed."""
        return [*(self.cache / "vllm-fusedq" / "cpu").glob("partial-*")]


@dataclass(frozen=True, slots=True)
class Command:
    """What is started again and again."""

    model: Path
    arguments: list[str]
    port: int
    home: Home
    environment: dict[str, str]

    def start(self, log: Path) -> tuple[Server, Watch]:
        env = self.environment | self.home.environment()
        server = launch(self.model, log, self.arguments, self.port, **env)
        watch = Watch(server.process.pid)
        watch.start()
        return server, watch


def kill_many(
    command: Command, struck: list[Kill], loading_seconds: float, seed: int
) -> Iterator[dict[str, Any]]:
    """A server for each kill, one after the other on one port, and one that is left alone.

    Yields, of each, what was left behind and what else went wrong, `problems`.
    """
    victims = Victims(command, loading_seconds, random.Random(seed), asks.pool(seed, 8))
    for number, kill in enumerate([*struck, LAST]):
        server, watch = command.start(command.home.folder / f"start-{number}.log")
        problems: list[str] = []
        try:
            problems += asyncio.run(victims.meet(server, kill))
        except (ServerDied, OSError) as error:
            problems.append(f"{type(error).__name__}: {str(error)[-LOG_SHOWN:]}")
        finally:
            compiling = command.home.partial_libraries()
            patience = COMPILER_SECONDS if compiling else GONE_SECONDS
            left = left_behind(server, watch, [command.home.temporary], patience)
        if (kill.target, kill.signal) == ("server", signal.SIGKILL):
            # Nobody tells vLLM's engine
            left.by_vllm += left.processes
            left.processes = []
        problems += left.problems
        yield {"kill": str(kill), **left.document(), "problems": problems}


LAST = Kill("idle", "server", signal.SIGTERM)


@dataclass(slots=True)
class Victims:
    """Brings servers to the moment of a kill, and kills them."""

    command: Command
    loading_seconds: float
    rng: random.Random
    asked: list[asks.Ask]
    alone: dict[asks.Ask, Answer] = field(default_factory=dict)

    async def meet(self, server: Server, kill: Kill) -> list[str]:
        """Kill a server that was just started; what was wrong with it and its answers."""
        if kill.moment in ("compiling", "loading"):
            if kill.moment == "compiling":
                await asyncio.to_thread(wait_for, self.command.home.partial_libraries, PATIENCE)
                await asyncio.sleep(self.rng.uniform(0, 10))
            else:
                await asyncio.sleep(self.rng.uniform(0.1, 0.95) * self.loading_seconds)
            if server.process.poll() is not None:
                raise ServerDied(server.log)
            await asyncio.to_thread(strike, server, kill)
            return []
        await asyncio.to_thread(wait_until_healthy, server, PATIENCE)
        found = [
            f"a start leaves {path.name} of another that was killed while it compiled"
            for path in self.command.home.partial_libraries()
        ]
        async with Clients(server.url, 16) as clients:
            for ask, answer in (await clients.alone(self.asked)).items():
                found += self._compared(asks.Sent(ask, False, None, None), answer)
            if kill.moment == "idle":
                await asyncio.to_thread(strike, server, kill)
                return found
            busy = asyncio.create_task(
                clients.under_load(asks.load(self.rng.getrandbits(32), self.asked), 0, 3600)
            )
            await asyncio.sleep(self.rng.uniform(0.2, 4))
            await asyncio.to_thread(strike, server, kill)
            clients.stopped = True
            try:
                # Clients of a dead server get an error, and what they read until then was right
                for sent, answer in await asyncio.wait_for(busy, GONE_SECONDS):
                    found += self._compared(sent, answer)
            except TimeoutError:
                found.append(f"clients still wait {GONE_SECONDS:.0f} s after the server was killed")
        return found

    def _compared(self, sent: asks.Sent, answer: Answer) -> list[str]:
        why, _ = difference(answer, self.alone.setdefault(sent.ask, answer))
        return [f"an answer is not that of the first server: {why}"] if why else []
