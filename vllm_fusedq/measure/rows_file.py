"""The user's file of measured rows while it grows: whole at every moment, and gone on with."""

import fcntl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from fusedq_kernels.choose.own_rows import own_file
from fusedq_kernels.choose.tuned_file import (
    FUSED,
    MAX_DECODE_M,
    TunedRow,
    TunedTable,
    minor,
    read,
    write,
)
from fusedq_kernels.dtype import DType
from fusedq_kernels.types import DeviceSpec, GemmShape, QuantSpec
from vllm_fusedq import __version__
from vllm_fusedq.errors import OutputError
from vllm_fusedq.measure.candidates import Measurement, tuned_rows
from vllm_fusedq.measure.tuner import Job
from vllm_fusedq.plan.layer import LayerPlan


class RowsFile:
    """The rows of one device under one Triton version.

    Raises:
        OutputError: the file that is there breaks the format, or is not to be read.
    """

    def __init__(self, device: DeviceSpec, triton: str) -> None:
        self.path = own_file(device, triton)
        self._device, self._triton = device, triton
        self._measurements = [_measurement(row) for row in self._stored()]

    @property
    def rows(self) -> Sequence[TunedRow]:
        return tuned_rows(self._measurements)

    def left_of(
        self, weights: Iterable[tuple[int, int, QuantSpec]], tokens: Iterable[int]
    ) -> list[Job]:
        """What is not measured yet of weights (N, K, spec) that run different code.

        The number of tokens without which a shape has no rows comes first.
        """
        order = sorted(tokens, key=lambda m: (m != MAX_DECODE_M, m))
        done = {(row.shape, row.max_m) for row in self.rows}
        jobs: dict[object, Job] = {}
        for n, k, spec in weights:
            shape = TunedRow(spec.weight_type, spec.group_size, n, k, 1, "", None, 1.0).shape
            left = tuple(m for m in order if (shape, m) not in done)
            if left:
                jobs.setdefault(shape, Job(n, k, spec, left))
        return list(jobs.values())

    def add(self, measurements: Iterable[Measurement]) -> None:
        """Put rows of these and all earlier measurements into the file.

        Raises:
            OutputError: the file cannot be written.
        """
        self._measurements += measurements
        rows = tuple(self.rows)
        if not rows:
            return
        date, by = datetime.now(UTC).date().isoformat(), f"vllm-fusedq {__version__}"
        table = TunedTable(self._device.name, self._triton, date, by, rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write(self.path, [table], self._device.capability)
        except OSError as error:
            raise _unwritten(self.path, error) from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While no other process writes the file.

        Raises:
            OutputError: one does, or the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_suffix(".lock").open("w")
        except OSError as error:
            raise _unwritten(self.path, error) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"{self.path}: another fusedq tune writes it; wait for that one, or end it"
                ) from None
            yield

    def _stored(self) -> tuple[TunedRow, ...]:
        if not self.path.exists():
            return ()
        try:
            tables = read(self.path, self._device.capability)
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self.path}: not a file of measured rows ({error}); remove it, then tune again"
            ) from error
        here = minor(self._triton)
        return tuple(row for t in tables if minor(t.triton) == here for row in t.rows)


def tunable(plans: Iterable[LayerPlan]) -> Iterator[tuple[int, int, QuantSpec]]:
    """(N, K, spec) of the weights whose launches measured rows decide; experts have rules alone."""
    for plan in plans:
        for use in plan.uses:
            if use.call.kernel == FUSED and plan.experts is None:
                yield use.call.n, use.call.k, use.call.spec


def _unwritten(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or error
    return OutputError(
        f"{path}: measured rows cannot be written: {reason}; "
        "set XDG_CACHE_HOME to a folder that can be"
    )


def _measurement(row: TunedRow) -> Measurement:
    spec = QuantSpec(row.weight_type, row.group_size, DType.FLOAT16)
    return Measurement(GemmShape(row.max_m, row.n, row.k), spec, row.tile, row.us, row.kernel)
