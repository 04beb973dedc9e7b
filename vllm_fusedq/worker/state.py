"""What one worker process runs and what it took to get there: the log, the file, the RPC answer."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedq_kernels.choose.tuning import unused_files
from vllm_fusedq.formats import CheckpointFormat, settle
from vllm_fusedq.load.experts import ExpertsLoader
from vllm_fusedq.load.loader import LayerLoader
from vllm_fusedq.load.provenance import StoredTensors
from vllm_fusedq.plan.experts import W13
from vllm_fusedq.plan.layer import LayerPlan, Target
from vllm_fusedq.plan.model import check_all_created
from vllm_fusedq.prove.launches import Loaded, LoadedExperts, LoadedLayer
from vllm_fusedq.settings import Settings
from vllm_fusedq.worker.last_words import speaking_last
from vllm_fusedq.worker.warmup import WarmUp, compile_ahead, warm_up

if TYPE_CHECKING:
    import torch

    from fusedq_kernels.cuda.ahead import AheadCompiler

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
class WorkerState:
    """What one worker process knows of a model: its target, its layers as they are created and
    loaded.

    `message_file` is where a refusal is left for the API process, `source` what loaded tensors are
    compared with. `plans` are those of the layers that were created, `loaders` those of the layers
    that are loaded, `experts` what serves of those of experts, by their prefix; `before_loading` is
    called in between. `load_seconds` is the time from
    `started` to the last loaded layer without the time spent on repacking and warming up; it covers
    reading the files and building the model. Bytes are this rank's.
    """

    target: Target
    settings: Settings
    message_file: str | None = None
    model: str = ""
    rank: WorkerRank = field(default_factory=WorkerRank)
    max_tokens: int = 1
    draft: bool = False
    vllm_version: str = ""
    unquantized: tuple[str, ...] = ()
    source: StoredTensors | None = None
    plans: list[LayerPlan] = field(default_factory=list)
    loaders: list[LayerLoader | ExpertsLoader] = field(default_factory=list)
    experts: dict[str, LoadedExperts] = field(default_factory=dict)
    before_loading: list[Callable[[], None]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    load_seconds: float = 0.0
    warmed: WarmUp = field(default_factory=lambda: WarmUp(0.0, 0))
    _with_bias: list[bool] = field(default_factory=list)
    _created: list[tuple[LayerPlan, Callable[[], bool]]] = field(default_factory=list)
    _new_experts: list[LoadedExperts] = field(default_factory=list)
    _ahead: list["AheadCompiler"] = field(default_factory=list)
    _warm: set[object] = field(default_factory=set)

    def layer_created(self, plan: LayerPlan, has_bias: Callable[[], bool]) -> None:
        """Take note of a layer that is to be loaded; `has_bias` is asked once all are there."""
        self.plans.append(plan)
        self._created.append((plan, has_bias))

    def experts_created(self, layer: LoadedExperts) -> None:
        """Take note of how the two weights of a layer of experts will serve, once they are loaded.

        `layer` is called by the prefix of both plans.
        """
        self.experts[layer.name] = layer
        self._new_experts.append(layer)

    def weight_arrives(self, device: "torch.device") -> None:
        """Before each weight: with the first after layers were created, start to compile theirs."""
        if not self._created:
            return
        # Some of vLLM's models (Mamba 2) do not ask `all_created` first
        self._begin_loading()
        layers = [(plan, has_bias()) for plan, has_bias in self._created]
        self._created.clear()
        experts, self._new_experts = self._new_experts, []
        compiler = compile_ahead(layers, experts, self.target, self.max_tokens, device)
        if compiler is not None:
            self._ahead.append(compiler)

    def guard(self) -> AbstractContextManager[None]:
        """Around what may refuse: the API process repeats a FusedQError as its last word."""
        return speaking_last(self.message_file)

    def layer_loaded(self, loader: LayerLoader | ExpertsLoader, has_bias: bool) -> None:
        """Take note of a finished layer; after the last one, run every launch once and report.

        Layers of multi-token prediction are created after that: then there is a second last one.

        Raises:
            WeightLoadError: the layers contradict each other about how they were stored.
            KernelError: a launch does not run here, or is wrong.
        """
        if any(known is loader for known in self.loaders):
            return  # A weight update: nothing new to compile or to tell
        self.loaders.append(loader)
        self._with_bias.append(has_bias)
        if len(self.loaders) < len(self.plans):
            return
        if self.source is not None:
            self.source.release()
        note = settle({name: one for each in self.loaders for name, one in each.findings.items()})
        spent = self.pack_seconds + self.warmed.seconds
        self.load_seconds = time.perf_counter() - self.started - spent
        self.warmed += warm_up(
            self._loaded(),
            self.target,
            self.max_tokens,
            check=self.settings.check_kernels,
            ahead=self._ahead,
            known=self._warm,
        )
        self._ahead.clear()
        if self.rank.reports:
            self._report(note)

    def _loaded(self) -> Iterator[Loaded]:
        """Every layer as it serves, one of experts once for its two weights."""
        for loader, has_bias in zip(self.loaders, self._with_bias, strict=True):
            plan = loader.plan
            if isinstance(loader, LayerLoader):
                yield LoadedLayer(plan.name, loader.packed, plan.uses, has_bias)
            elif plan.shard.weight == W13:
                yield self.experts[plan.prefix]

    def all_created(self, fmt: CheckpointFormat) -> None:
        """Before weights are loaded: `plan.model.check_all_created`, and what layers asked for."""
        last = self.rank.pipeline == self.rank.pipeline_size - 1
        check_all_created(fmt, self.plans, first_stage=self.rank.pipeline == 0, last_stage=last)
        self._begin_loading()

    def _begin_loading(self) -> None:
        while self.before_loading:
            self.before_loading.pop()()

    @property
    def pack_seconds(self) -> float:
        return sum(loader.pack_seconds for loader in self.loaders)

    @property
    def stored_bytes(self) -> int:
        return sum(loader.stored_bytes for loader in self.loaders)

    @property
    def resident_bytes(self) -> int:
        return sum(size for loader in self.loaders for _, size in loader.plan.resident)

    def document(self) -> dict[str, Any]:
        """The JSON document of `docs/schemas/plan.v1.json`."""
        from vllm_fusedq.report.document import counts_json, device_json, document, layers_json

        return document(
            "plan",
            vllm_version=self.vllm_version,
            model=self.model,
            rank=asdict(self.rank),
            device=device_json(self.target.device, None),
            dtype=self.target.act_dtype.value,
            layers=layers_json(self.plans),
            unquantized=list(self.unquantized),
            counts=counts_json(self.plans, self.unquantized),
            loading={"seconds": self.load_seconds, "bytes": self.stored_bytes},
            repacking={"seconds": self.pack_seconds, "bytes": self.resident_bytes},
            warm_up=asdict(self.warmed),
        )

    def _report(self, note: str) -> None:
        """The folded plan at INFO, what loading took, and the file that the settings name."""
        # Tables cost every vLLM process 30 ms of import; only one engine prints one.
        from vllm_fusedq.report.document import write_document
        from vllm_fusedq.report.table import log_plan

        if note:
            logger.warning(note)
        log_plan(self.plans, self.unquantized)
        for why in unused_files(self.target.device):
            logger.warning("fusedq tuned rows: %s", why)
        logger.info(
            "fusedq loading: %.2f s, %.1f MB read; repacking: %.2f s, %.1f MB resident; "
            "warm-up: %.2f s, %d launches, %d of them compared with PyTorch",
            self.load_seconds,
            self.stored_bytes / 1e6,
            self.pack_seconds,
            self.resident_bytes / 1e6,
            self.warmed.seconds,
            self.warmed.launches,
            self.warmed.checked,
        )
        if self.warmed.cache is not None:
            logger.info("fusedq kernels are kept compiled in %s", self.warmed.cache)
        if self.settings.report is not None:
            path = self.rank.report_file(Path(self.settings.report), self.draft)
            write_document(path, self.document())
