"""Ahead-of-time inspection: compile every kernel that `heuristics.select` can name, read the SASS.

Needs no GPU. `python -m fusedq_kernels.audit --target sm_90` prints registers, spills, shared
memory and what the main loop is made of, and fails where `rows.py` finds a problem, so that a
Triton release that stops feeding the tensor cores from registers is seen before it is shipped. The
slices of `slices.py` follow. `--target all` takes minutes: every architecture. `--everything` takes
an hour and more: each variant that can be launched on one architecture (`everything.py`). Run it in
a process of its own and without TRITON_INTERPRET, which replaces the compiler by the interpreter.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import triton

from fusedq_kernels.audit import everything, slices
from fusedq_kernels.audit.compile import TRITON_NAMES, architectures, audited_groups, usual_spec
from fusedq_kernels.audit.fused import audit_tile
from fusedq_kernels.audit.rows import (
    RESOURCE_COLUMNS,
    SCHEME_COLUMNS,
    VERDICT_COLUMNS,
    AuditRow,
    Columns,
    tile_name,
)
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.choose.heuristics import tiles_for
from fusedq_kernels.choose.tiles import rules_for
from fusedq_kernels.cuda import gemm
from fusedq_kernels.types import (
    TILED_LAYOUTS,
    DeviceSpec,
    TileConfig,
    WeightType,
)

_ACT_DTYPES = {name: dtype for dtype, name in TRITON_NAMES.items()}


def audit(
    target: str,
    tiles: Collection[str] | None = None,
    weight_types: Iterable[WeightType] = tuple(WeightType),
    act_dtypes: Iterable[torch.dtype] = gemm.ACT_DTYPES,
    group_sizes: Iterable[int] = (128,),
    *,
    scale_dtype: torch.dtype | None = None,
    split_k: int = 1,
    has_bias: bool = True,
    batch_invariant: bool = False,
) -> list[AuditRow]:
    """Compile each combination for `target`, a name known to `device_by_name`.

    `tiles` names the tiles to keep ("16x128", "128x128s" where the scale multiplies the weights) of
    all those that `select` can return for the device and group size. A group size of at least
    `compile.AUDIT_K` stands for per-channel scales, `scale_dtype` None for that of the
    activations, or of NVFP4 beside its weights. With `batch_invariant` only the tile for more than
    64 tokens, adding up 4 segments of K: the others are those of any layer.
    """
    device = device_by_name(target)
    return [
        audit_tile(target, replace(tile, split_k=split_k), spec, act_dtype, has_bias)
        for group_size in group_sizes
        for weight_type in weight_types
        for act_dtype in act_dtypes
        for spec in [usual_spec(weight_type, group_size, scale_dtype or act_dtype)]
        for tile in _tiles(device, weight_type, audited_groups(spec).step, batch_invariant)
        if tiles is None or tile_name(tile) in tiles
    ]


def _tiles(
    device: DeviceSpec, weight_type: WeightType, step: int, batch_invariant: bool
) -> tuple[TileConfig, ...]:
    if not batch_invariant:
        return tiles_for(device, weight_type, step)
    layout = TILED_LAYOUTS[weight_type]
    many = rules_for(device, layout, step, batch_invariant)[-1]
    return tuple(replace(choice.tile, segments=4) for choice in many.choices)


def format_table(rows: Sequence[object], columns: Mapping[str, Callable[..., object]]) -> str:
    """Right-aligned text, one line per row under a heading."""
    lines = [tuple(columns)]
    lines += [tuple(str(cell(row)) for cell in columns.values()) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


_COLUMNS: Columns = {
    "target": lambda row: row.target,
    "tile": lambda row: row.tile_name,
    "warps": lambda row: row.tile.num_warps,
    "stages": lambda row: row.tile.num_stages,
    "bias": lambda row: "yes" if row.has_bias else "no",
    **SCHEME_COLUMNS,
    **RESOURCE_COLUMNS,
    "tmem": lambda row: row.tmem,
    "loop": lambda row: row.loop_instructions,
    "instr/w": lambda row: f"{row.instructions_per_weight:.2f}",
    "ALU": lambda row: row.alu,
    "FMA": lambda row: row.fma,
    "rest": lambda row: row.loop_instructions - row.alu - row.fma,
    "STS": lambda row: row.sts,
    "LDG": lambda row: row.ldg,
    "running": lambda row: row.running,
    **VERDICT_COLUMNS,
}


def main(argv: list[str] | None = None) -> int:
    parser = arguments()
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--csv", type=Path, help="write the cells of the table to this file too")
    add = parser.add_argument_group("everything").add_argument
    add("--everything", action="store_true", help="all that can be launched, to --csv, resumed")
    add("--of", choices=list(everything.JOBS), default="weights", help="what is launched")
    add("--share", default="1/1", help="2/8: the second of eight shares, each spread over all")
    add("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    args = parser.parse_args(argv)
    if args.everything:
        if args.csv is None:
            parser.error("--everything writes to --csv")
        share = everything.Share.parse(args.share)
        return everything.run(args.target, args.csv, share, args.jobs, args.of)
    rows = rows_of(args)
    sliced = [] if args.tile or args.batch_invariant else _slice_rows(args)
    if args.csv:
        write_csv(args.csv, rows, sliced)
    if args.json:
        found = {"fused": rows, "slices": sliced}
        lists = {name: [row.as_json() for row in each] for name, each in found.items()}
        print(json.dumps({"triton": triton.__version__, **lists}, indent=1))
    else:
        print(f"triton {triton.__version__}\n{format_table(rows, _COLUMNS)}")
        if sliced:
            print(f"slices\n{format_table(sliced, slices.COLUMNS)}")
    return 1 if any(row.problems for row in (*rows, *sliced)) else 0


def write_csv(path: Path, rows: Iterable[AuditRow], sliced: Iterable[slices.SliceRow]) -> None:
    """One line per compiled kernel, under the headings of both tables."""
    version = triton.__version__
    cells = [
        {"triton": version, "kernel": "triton-gemm", "segments": row.tile.segments}
        | {name: cell(row) for name, cell in _COLUMNS.items()}
        for row in rows
    ]
    cells += [
        {"triton": version, "kernel": "sliced-cublas"}
        | {name: cell(row) for name, cell in slices.COLUMNS.items()}
        for row in sliced
    ]
    names = dict.fromkeys(name for each in cells for name in each)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells)


def arguments() -> argparse.ArgumentParser:
    """What chooses the kernels to compile."""
    parser = argparse.ArgumentParser(prog="python -m fusedq_kernels.audit", description=__doc__)
    add = parser.add_argument
    add("--target", default="sm_90", help="known device or architecture, or all")
    add("--tile", nargs="+", help="only these tiles: 16x128 128x128s")
    add("--weight-type", nargs="+", type=WeightType, default=list(WeightType))
    add("--act-dtype", nargs="+", choices=list(_ACT_DTYPES), default=list(_ACT_DTYPES))
    add("--group-size", nargs="+", type=int, default=[128])
    add("--scale-dtype", choices=list(_ACT_DTYPES), help="that of the activations by default")
    add("--split-k", type=int, default=1)
    add("--no-bias", action="store_true", help="without a bias, which is added by default")
    add("--batch-invariant", action="store_true", help="the tile of more than 64 tokens")
    return parser


def rows_of(args: argparse.Namespace) -> list[AuditRow]:
    """`audit` of what the `arguments` chose."""
    return [
        row
        for target in _targets(args)
        for row in audit(
            target,
            args.tile,
            args.weight_type,
            [_ACT_DTYPES[name] for name in args.act_dtype],
            args.group_size,
            scale_dtype=_ACT_DTYPES.get(args.scale_dtype),
            split_k=args.split_k,
            has_bias=not args.no_bias,
            batch_invariant=args.batch_invariant,
        )
    ]


def _slice_rows(args: argparse.Namespace) -> list[slices.SliceRow]:
    act_dtypes = [_ACT_DTYPES[name] for name in args.act_dtype]
    return [
        row
        for target in _targets(args)
        for row in slices.audit_slices(target, args.weight_type, act_dtypes, args.group_size)
    ]


def _targets(args: argparse.Namespace) -> list[str]:
    return architectures() if args.target == "all" else [args.target]


if __name__ == "__main__":
    sys.exit(main())
