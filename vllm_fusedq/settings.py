"""Runtime settings: `--additional-config '{"fusedq": {...}}'`, validated, unknown keys refused."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fusedq_kernels.catalogue import KERNELS, Op, kernels_for
from fusedq_kernels.choose.device import cpu_device, device_by_name
from fusedq_kernels.record import ChosenBy
from fusedq_kernels.types import DeviceSpec
from vllm_fusedq.errors import SettingsError

PREFILL = ("auto", "fused")
KEEP_ACTIVATIONS = "16-bit"
ACTIVATIONS = ("auto", KEEP_ACTIVATIONS)
EXPERIMENTAL = "experimental"
DEVICES = ("auto", EXPERIMENTAL)


@dataclass(frozen=True, slots=True)
class Settings:
    """`kernel`: "auto", or one kernel's name to insist on for every layer. `prefill`: "auto", or
    "fused" to forbid sliced-cublas where measured rows name it. `report`: the file that the live
    report is written to, None for none. `check_kernels`: whether a GPU's launches are compared with
    plain PyTorch before they serve. `activations`: "auto", or "16-bit" to serve the weights of a
    checkpoint that quantizes activations too, which is refused otherwise. `device`: "auto", or
    "experimental" to serve on a GPU for which kernels were compiled and never run."""

    kernel: str = "auto"
    prefill: str = "auto"
    report: str | None = None
    check_kernels: bool = True
    activations: str = "auto"
    device: str = "auto"

    @property
    def experimental(self) -> bool:
        """Whether a GPU may serve on which nothing was run."""
        return self.device == EXPERIMENTAL

    @property
    def insisted(self) -> str | None:
        return None if self.kernel == "auto" else self.kernel

    @property
    def sliced_prefill(self) -> bool:
        """Who insists on a kernel wants it for every number of tokens."""
        return self.prefill == "auto" and self.insisted is None

    @property
    def keeps_activations(self) -> bool:
        """Whether activations stay in 16 bits where the checkpoint quantizes them."""
        return self.activations == KEEP_ACTIVATIONS

    def planned_device(self, found: DeviceSpec) -> DeviceSpec:
        """`found`, or what stands for it when planning for a GPU's kernel in the interpreter.

        Raises:
            SettingsError: the device cannot run that kernel.
        """
        names = [kernel.name for kernel in kernels_for(found)]
        if self.insisted is None or self.insisted in names:
            return found
        if found.kind == "cpu" and KERNELS[self.insisted].device == "cuda":
            if os.environ.get("TRITON_INTERPRET") == "1":
                return replace(device_by_name("sm_90"), name="interpreter")
            raise SettingsError(
                f'additional-config "fusedq": kernel {self.kernel!r} on a CPU runs in Triton\'s '
                "interpreter only; set TRITON_INTERPRET=1"
            )
        raise SettingsError(
            f'additional-config "fusedq": kernel {self.kernel!r} does not run on {found.name}; '
            f"supported there: {', '.join(names)}"
        )


def this_cpu() -> DeviceSpec:
    """This machine's CPU; raises SettingsError for an instruction set that it does not have."""
    try:
        return cpu_device()
    except ValueError as error:
        raise SettingsError(str(error)) from None


def parse_settings(section: Any) -> Settings:
    """Validate the `fusedq` section of vLLM's additional config.

    Raises:
        SettingsError: not an object, an unknown key, or a value that is not allowed.
    """
    if not isinstance(section, Mapping):
        raise SettingsError(
            f'additional-config "fusedq": found {type(section).__name__}; supported: an object'
        )
    known = [field.name for field in fields(Settings)]
    if unknown := sorted(set(section) - set(known)):
        raise SettingsError(
            f'additional-config "fusedq": unknown key {", ".join(map(repr, unknown))}; '
            f"supported: {', '.join(known)}"
        )
    settings = Settings(**section)
    matmuls = (each for each in KERNELS.values() if each.op is Op.MATMUL)
    allowed = ["auto", *(each.name for each in matmuls if each.chosen_by is not ChosenBy.ROWS)]
    if settings.kernel not in allowed:
        raise SettingsError(
            f'additional-config "fusedq": kernel {settings.kernel!r} does not exist; '
            f"supported: {', '.join(allowed)}"
        )
    if settings.prefill not in PREFILL:
        raise SettingsError(
            f'additional-config "fusedq": prefill is {settings.prefill!r:.80}; '
            f"supported: {', '.join(PREFILL)}"
        )
    if settings.activations not in ACTIVATIONS:
        raise SettingsError(
            f'additional-config "fusedq": activations is {settings.activations!r:.80}; '
            f"supported: {', '.join(ACTIVATIONS)}"
        )
    if not isinstance(settings.check_kernels, bool):
        raise SettingsError(
            f'additional-config "fusedq": check_kernels is {settings.check_kernels!r:.80}; '
            "supported: true, false"
        )
    if settings.device not in DEVICES:
        raise SettingsError(
            f'additional-config "fusedq": device is {settings.device!r:.80}; '
            f"supported: {', '.join(DEVICES)}"
        )
    if settings.experimental and not settings.check_kernels:
        raise SettingsError(
            'additional-config "fusedq": check_kernels is false on an experimental device; '
            "supported: true, where nothing else has compared its kernels"
        )
    _check_report(settings.report)
    return settings


def _check_report(report: Any) -> None:
    """Before the model is loaded: a file in a directory that can be written."""
    if report is None:
        return
    if not isinstance(report, str) or not report:
        raise SettingsError(
            f'additional-config "fusedq": report is {report!r:.80}; supported: the name of a file'
        )
    folder = Path(report).parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)) or Path(report).is_dir():
        raise SettingsError(
            f'additional-config "fusedq": report {report!r} cannot be written; supported: a file '
            "in a directory that exists and is writable where the workers run"
        )
