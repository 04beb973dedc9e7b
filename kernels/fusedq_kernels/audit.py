"""Ahead-of-time inspection: compile every tile that `heuristics.select` can return, read the SASS.

Needs no GPU. `python -m fusedq_kernels.audit --target sm_90` prints registers, spills, shared
memory and what the main loop is made of, and fails where `audit_row.py` finds a problem, so that a
Triton release that stops feeding the tensor cores from registers is seen before it is shipped.
`--target all` takes minutes: every architecture. Run it in a process of its own and without
TRITON_INTERPRET, which replaces the compiler by the interpreter.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedq_kernels import gemm
from fusedq_kernels.audit_row import AuditRow, tile_name
from fusedq_kernels.device import KNOWN_DEVICES, device_by_name
from fusedq_kernels.geometry import GroupGeometry, group_geometry
from fusedq_kernels.heuristics import tiles_for
from fusedq_kernels.types import DeviceSpec, QuantSpec, TileConfig, WeightType

AUDIT_K = 1 << 16

_TRITON_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_ACT_DTYPES = {name: dtype for dtype, name in _TRITON_NAMES.items()}
_SPLIT_POINTERS = ("partial_ptr", "arrivals_ptr")
_POINTERS = ("x_ptr", "qweight_ptr", "scales_ptr", "bias_ptr", "y_ptr", *_SPLIT_POINTERS)
_ALIGNED = [["tt.divisibility", gemm.ALIGNMENT]]
_WARP_SIZE = 32

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_BRANCH_TARGET = re.compile(r"0x([0-9a-f]+)")
_MMA_PTX = re.compile(r"\b(wgmma)\.mma_async|\b(mma)\.sync|\b(tcgen05)\.mma")
_MMA_SASS = ("HGMMA", "HMMA", "UTCHMMA")


def audit(
    target: str,
    tiles: Collection[str] | None = None,
    weight_types: Iterable[WeightType] = tuple(WeightType),
    act_dtypes: Iterable[torch.dtype] = gemm.ACT_DTYPES,
    group_sizes: Iterable[int] = (128,),
    *,
    scale_dtype: torch.dtype | None = None,
    split_k: int = 1,
    batch_invariant: bool = False,
) -> list[AuditRow]:
    """Compile each combination for `target`, a name known to `device_by_name`.

    `tiles` names the tiles to keep ("16x128", "128x128s" where the scale multiplies the weights) of
    all those that `select` can return for the device and group size. A group size of at least
    `AUDIT_K` stands for per-channel scales, `scale_dtype` None for that of the activations. With
    `batch_invariant` only the tile for more than 64 tokens, adding up 4 segments of K: the others
    are those of any layer.
    """
    device = device_by_name(target)
    return [
        _audit_one(
            target,
            device,
            replace(tile, split_k=split_k),
            QuantSpec(weight_type, group_size, scale_dtype or act_dtype),
            act_dtype,
        )
        for group_size in group_sizes
        for weight_type in weight_types
        for act_dtype in act_dtypes
        for tile in _tiles(device, weight_type, _geometry(group_size).step, batch_invariant)
        if tiles is None or tile_name(tile) in tiles
    ]


def _tiles(
    device: DeviceSpec, weight_type: WeightType, step: int, batch_invariant: bool
) -> tuple[TileConfig, ...]:
    tiles = tiles_for(device, weight_type, step, batch_invariant)
    return tuple(replace(tile, segments=4) for tile in tiles[-1:]) if batch_invariant else tiles


def _geometry(group_size: int) -> GroupGeometry:
    return group_geometry(AUDIT_K, group_size, 0)


def _audit_one(
    target: str, device: DeviceSpec, tile: TileConfig, spec: QuantSpec, act_dtype: torch.dtype
) -> AuditRow:
    kernel = compile_gemm(target_of(device), tile, spec, act_dtype)
    instructions, usage = _disassemble(kernel.asm["cubin"])
    body = main_loop(instructions)
    ops = Counter(_opcode(text).split(".")[0] for text in body)
    mma = {name for match in _MMA_PTX.findall(kernel.asm["ptx"]) for name in match if name}
    return AuditRow(
        target=target,
        tile=tile,
        weight_type=spec.weight_type.value,
        act_dtype=_TRITON_NAMES[act_dtype],
        group_size=spec.group_size,
        registers=usage["REG"],
        stack=usage["STACK"],
        smem=kernel.metadata.shared,
        tmem=kernel.metadata.tmem_size,
        mma="+".join(sorted(mma)),
        loop_instructions=len(body),
        sts=ops["STS"] + ops["STSM"],
        ldg=ops["LDG"],
        local=ops["LDL"] + ops["STL"],
    )


def target_of(device: DeviceSpec) -> GPUTarget:
    """The compiler's name for an NVIDIA GPU."""
    major, minor = device.capability
    return GPUTarget("cuda", 10 * major + minor, _WARP_SIZE)


def compile_gemm(
    target: GPUTarget, tile: TileConfig, spec: QuantSpec, act_dtype: torch.dtype
) -> triton.compiler.CompiledKernel:
    """Compile the main kernel exactly as `fused_gemm` would specialise it, with a bias."""
    if gemm.INTERPRETED:
        raise RuntimeError("unset TRITON_INTERPRET: the interpreter has no compiler")
    kernel = gemm.fused_gemm_kernel
    geometry = _geometry(spec.group_size)
    constants = gemm.kernel_constants(
        spec, geometry.step, geometry.num_groups, tile, act_dtype, has_bias=True
    )
    act = "*" + _TRITON_NAMES[act_dtype]
    scales = "*i32" if spec.has_zero_points else "*fp32"
    pointers = dict(zip(_POINTERS, (act, "*i32", scales, act, act, "*fp32", "*i32"), strict=True))
    if tile.x_descriptor:
        block = f"{tile.block_m}, {geometry.step}"
        pointers["x_ptr"] = f"tensordesc<{_TRITON_NAMES[act_dtype]}[{block}]>"
    if tile.split_k == 1:
        # The JIT takes an argument that is None for a constant.
        constants |= dict.fromkeys(_SPLIT_POINTERS)
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {*pointers, *gemm.ALIGNED_ARGS, "N"} - {*constants, "bias_ptr"}
    attrs = {(i,): _ALIGNED for i, name in enumerate(kernel.arg_names) if name in aligned}
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs),
        target=target,
        options={
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "enable_fp_fusion": gemm.FP_FUSION,
            "launch_pdl": tile.pdl,
        },
    )


def _disassemble(cubin: bytes) -> tuple[list[tuple[int, str]], dict[str, int]]:
    """SASS as (address, text) and the REG and STACK figures of `cuobjdump -res-usage`."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run(
            [tool, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    usage = {
        key: int(value)
        for key, value in re.findall(r"\b(REG|STACK):(\d+)", done.stdout + done.stderr)
    }
    matches = (_INSTRUCTION.match(line) for line in sass.splitlines())
    return [(int(m[1], 16), m[2]) for m in matches if m], usage


def _opcode(text: str) -> str:
    return _PREDICATE.sub("", text).split()[0]


def main_loop(instructions: list[tuple[int, str]]) -> list[str]:
    """The smallest loop that holds all tensor-core instructions any loop holds.

    Smallest, because barrier spin loops placed out of line look like loops around everything.
    """
    best: tuple[int, int] | None = None
    body: list[str] = []
    for address, text in instructions:
        target = _BRANCH_TARGET.search(text)
        if "BRA" not in _opcode(text) or not target or int(target[1], 16) >= address:
            continue
        start = int(target[1], 16)
        candidate = [t for a, t in instructions if start <= a <= address]
        num_mma = sum(_opcode(t).startswith(_MMA_SASS) for t in candidate)
        if best is None or (num_mma, -len(candidate)) > best:
            best, body = (num_mma, -len(candidate)), candidate
    return body


def format_table(rows: Iterable[AuditRow]) -> str:
    """Right-aligned text, one line per row under a heading."""
    lines = [tuple(_COLUMNS)]
    lines += [tuple(str(cell(row)) for cell in _COLUMNS.values()) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


_COLUMNS: dict[str, Callable[[AuditRow], object]] = {
    "target": lambda row: row.target,
    "tile": lambda row: row.tile_name,
    "warps": lambda row: row.tile.num_warps,
    "stages": lambda row: row.tile.num_stages,
    "weight": lambda row: row.weight_type,
    "act": lambda row: row.act_dtype,
    "group": lambda row: row.group_size,
    "regs": lambda row: row.registers,
    "stack": lambda row: row.stack,
    "smem": lambda row: row.smem,
    "tmem": lambda row: row.tmem,
    "mma": lambda row: row.mma,
    "loop": lambda row: row.loop_instructions,
    "instr/w": lambda row: f"{row.instructions_per_weight:.2f}",
    "STS": lambda row: row.sts,
    "LDG": lambda row: row.ldg,
    "local": lambda row: row.local,
    "problems": lambda row: ", ".join(row.problems) or "none",
}


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    rows = _rows(args)
    if args.json:
        print(json.dumps([as_json(row) for row in rows], indent=1))
    else:
        print(f"triton {triton.__version__}\n{format_table(rows)}")
    return 1 if any(row.problems for row in rows) else 0


def rows_of(argv: list[str]) -> list[AuditRow]:
    """What the command finds with these arguments."""
    return _rows(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fusedq_kernels.audit", description=__doc__)
    add = parser.add_argument
    add("--target", default="sm_90", help="known device or architecture, or all")
    add("--tile", nargs="+", help="only these tiles: 16x128 128x128s")
    add("--weight-type", nargs="+", type=WeightType, default=list(WeightType))
    add("--act-dtype", nargs="+", choices=list(_ACT_DTYPES), default=list(_ACT_DTYPES))
    add("--group-size", nargs="+", type=int, default=[128])
    add("--scale-dtype", choices=list(_ACT_DTYPES), help="that of the activations by default")
    add("--split-k", type=int, default=1)
    add("--batch-invariant", action="store_true", help="the tile of more than 64 tokens")
    return parser


def _rows(args: argparse.Namespace) -> list[AuditRow]:
    return [
        row
        for target in (_architectures() if args.target == "all" else [args.target])
        for row in audit(
            target,
            args.tile,
            args.weight_type,
            [_ACT_DTYPES[name] for name in args.act_dtype],
            args.group_size,
            scale_dtype=_ACT_DTYPES.get(args.scale_dtype),
            split_k=args.split_k,
            batch_invariant=args.batch_invariant,
        )
    ]


def _architectures() -> list[str]:
    capabilities = dict.fromkeys(device.capability for device in KNOWN_DEVICES.values())
    return [f"sm_{major}{minor}" for major, minor in capabilities]


def as_json(row: AuditRow) -> dict[str, object]:
    """Its fields, and what follows from them."""
    return asdict(row) | {
        "instructions_per_weight": row.instructions_per_weight,
        "problems": row.problems,
    }


if __name__ == "__main__":
    sys.exit(main())
