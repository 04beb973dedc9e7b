"""What one worker process runs and what it took to get there: the log, the file, the RPC answer."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_fusedq.load import LayerLoader
from vllm_fusedq.plan import LayerPlan, Target
from vllm_fusedq.warmup import LoadedLayer, WarmUp, warm_up

logger = logging.getLogger("vllm.fusedq")


@dataclass(frozen=True, slots=True)
class WorkerRank:
    """Which worker of an engine this is."""

    tensor: int = 0
    tensor_size: int = 1
    pipeline: int = 0
    pipeline_size: int = 1
    data: int = 0

    @property
    def reports(self) -> bool:
        """Whether this worker speaks for its pipeline stage; the other ranks hold the same."""
        return self.tensor == 0 and self.data == 0

    def report_file(self, path: Path, draft: bool = False) -> Path:
        """Where a report goes: the first stage's to `path`, the others' and a draft's beside it."""
        if draft:
            path = path.with_suffix(f".draft{path.suffix}")
        return path.with_suffix(f".stage{self.pipeline}{path.suffix}") if self.pipeline else path


@dataclass(slots=True)
class LiveReport:
    """Collects a worker's layers as they are loaded; `started` is when the first was created.

    `load_seconds` is the time from there to the last loaded layer without the time spent on
    repacking; it covers reading the files and building the model. Bytes are this rank's.
    """

    target: Target
    model: str
    rank: WorkerRank
    max_tokens: int
    started: float = field(default_factory=time.perf_counter)
    load_seconds: float = 0.0
    warmed: WarmUp | None = None
    loaders: list[LayerLoader] = field(default_factory=list)
    with_bias: list[bool] = field(default_factory=list)

    def add(self, loader: LayerLoader, has_bias: bool) -> None:
        self.loaders.append(loader)
        self.with_bias.append(has_bias)

    def finish(self) -> None:
        """After the last layer: stop the clock, run every launch once."""
        self.load_seconds = time.perf_counter() - self.started - self.pack_seconds
        layers = (
            LoadedLayer(loader.packed, loader.plan.kernel, has_bias, loader.plan.gather)
            for loader, has_bias in zip(self.loaders, self.with_bias, strict=True)
        )
        self.warmed = warm_up(layers, self.target, self.max_tokens)

    @property
    def pack_seconds(self) -> float:
        return sum(loader.pack_seconds for loader in self.loaders)

    @property
    def stored_bytes(self) -> int:
        return sum(loader.stored_bytes for loader in self.loaders)

    @property
    def resident_bytes(self) -> int:
        return sum(size for loader in self.loaders for _, size in loader.plan.resident)

    def log(self, plans: Sequence[LayerPlan], unquantized: Sequence[str]) -> None:
        """The folded plan at INFO, and what loading took."""
        from vllm_fusedq.report import log_plan

        log_plan(plans, unquantized)
        warmed = self.warmed or WarmUp(0.0, 0)
        logger.info(
            "fusedq loading: %.2f s, %.1f MB read; repacking: %.2f s, %.1f MB resident; "
            "warm-up: %.2f s, %d launches",
            *(self.load_seconds, self.stored_bytes / 1e6),
            *(self.pack_seconds, self.resident_bytes / 1e6),
            *(warmed.seconds, warmed.launches),
        )

    def document(
        self, plans: Sequence[LayerPlan], unquantized: Sequence[str], vllm_version: str
    ) -> dict[str, Any]:
        """The JSON document of `docs/schemas/plan.v1.json`."""
        from vllm_fusedq.report_json import counts_json, device_json, document, layers_json

        warmed = self.warmed or WarmUp(0.0, 0)
        return document(
            "plan",
            vllm_version=vllm_version,
            model=self.model,
            rank=asdict(self.rank),
            device=device_json(self.target.device, None),
            dtype=self.target.act_dtype.value,
            layers=layers_json(plans),
            unquantized=list(unquantized),
            counts=counts_json(plans, unquantized),
            loading={"seconds": self.load_seconds, "bytes": self.stored_bytes},
            repacking={"seconds": self.pack_seconds, "bytes": self.resident_bytes},
            warm_up=asdict(warmed),
        )
