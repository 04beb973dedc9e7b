"""Deliberate faults, each with the tests that must notice it; `scripts/mutants.py` tries them."""

from faults.fault import Fault
from faults.kernels import KERNEL_FAULTS
from faults.plugin import PLUGIN_FAULTS

FAULTS: tuple[Fault, ...] = (*KERNEL_FAULTS, *PLUGIN_FAULTS)
