"""Writes the table of docs/which-format.md from the registries of weight types and kernels.

    python scripts/format_sizes.py [--check]

`--check` writes nothing and fails where it is not up to date.
"""

import sys
from pathlib import Path

from fusedq_kernels.catalogue import kernel_for
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.dtype import DType
from fusedq_kernels.layouts.resident import resident_tensors
from fusedq_kernels.types import TILED_LAYOUTS, DeviceSpec, QuantSpec, WeightType

PAGE = Path(__file__).resolve().parent.parent / "docs" / "which-format.md"
N = K = 4096
GROUPS = (32, 64, 128, K)
DEVICES = (device_by_name("h200"), DeviceSpec("cpu", "cpu", cpu_isa="generic"))
HEAD = (
    "| weight type | groups of 32 | of 64 | of 128 | per channel | on a GPU | on a CPU |\n"
    "| --- | --- | --- | --- | --- | --- | --- |\n"
)


def bytes_per_weight(weight_type: WeightType, group_size: int) -> float:
    """Of a weight as it is resident, with 16-bit scales and zero points."""
    spec = QuantSpec(weight_type, group_size, DType.FLOAT16)
    layout = TILED_LAYOUTS[weight_type]
    tensors = resident_tensors(layout, N, K, spec, 0, DType.FLOAT16)
    return sum(tensor.nbytes for tensor in tensors.values()) / (N * K)


def row(weight_type: WeightType) -> str:
    sizes = [f"{bytes_per_weight(weight_type, size):.3f}" for size in GROUPS]
    kernels = [kernel_for(device, weight_type).name for device in DEVICES]
    return f"| {' | '.join((weight_type.value, *sizes, *kernels))} |\n"


def with_table(text: str) -> str:
    """`text` with its table replaced; raises ValueError where it has none."""
    start = text.index(HEAD)
    # A table ends with the first line that is none of its own
    stop = text.index("\n\n", start) + 1
    return text[:start] + HEAD + "".join(map(row, WeightType)) + text[stop:]


def main() -> None:
    text = PAGE.read_text()
    written = with_table(text)
    if "--check" in sys.argv[1:]:
        if written != text:
            sys.exit("docs/which-format.md is not up to date: run python scripts/format_sizes.py")
        return
    PAGE.write_text(written)


if __name__ == "__main__":
    main()
