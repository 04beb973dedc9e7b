"""The plan as programs read it. docs/schemas/ holds the schemas; a change of them is a new version.

Sizes are bytes on one rank. `kernel` names are those of `catalogue.KERNELS`.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusedq_kernels.types import DeviceSpec, Launch
from vllm_fusedq import __version__
from vllm_fusedq.errors import FusedQError, PreflightError, Problem
from vllm_fusedq.plan.capacity import NOT_COUNTED, Capacity
from vllm_fusedq.plan.layer import LayerPlan
from vllm_fusedq.plan.uses import SHOWN_TOKENS, Use
from vllm_fusedq.report.table import plan_rows

SCHEMA_VERSION = 1


def document(kind: str, **content: Any) -> dict[str, Any]:
    """A JSON document of the schema `docs/schemas/<kind>.v<SCHEMA_VERSION>.json`."""
    schema = {"schema": f"vllm-fusedq/{kind}", "schema_version": SCHEMA_VERSION}
    return {**schema, "fusedq_version": __version__, **content}


def layers_json(plans: Sequence[LayerPlan]) -> list[dict[str, Any]]:
    """The folded rows of a plan."""
    rows = []
    for row in plan_rows(plans):
        plan, first = row.plan, row.plan.formats[0]
        rows.append(
            {
                "layers": row.name,
                "count": row.count,
                "experts": None if plan.experts is None else list(plan.experts),
                "format": first.format,
                "description": first.description,
                "weight_type": plan.spec.weight_type.value,
                "bits": plan.spec.weight_type.bits,
                "symmetric": not plan.spec.has_zero_points,
                "group_size": first.spec.group_size,
                "act_order": plan.ordered,
                "in_features": plan.k,
                "resident_rows": plan.rows,
                "out_features": plan.n,
                "phase": plan.phase,
                "kernel": plan.kernel_names,
                **{step: _launch_json(plan.launch(m)) for step, m in SHOWN_TOKENS.items()},
                "declared": _declared_json(plan.main),
                "bytes": row.resident,
                "bits_per_weight": round(plan.bits_per_weight, 4),
                "verdict": "fused",
            }
        )
    return rows


def counts_json(plans: Sequence[LayerPlan], unquantized: Sequence[str]) -> dict[str, int]:
    return {"fused": len(plans), "unquantized": len(unquantized), "fallbacks": 0}


def capacity_json(capacity: Capacity) -> dict[str, Any]:
    derived = ("fixed", "for_kv_cache", "kv_cache", "kv_tokens", "remains")
    found = asdict(capacity) | {name: getattr(capacity, name) for name in derived}
    return found | {"unmodelled": list(capacity.unmodelled), "not_counted": NOT_COUNTED}


def device_json(device: DeviceSpec, memory: int | None) -> dict[str, Any]:
    return {
        "name": device.name,
        "kind": device.kind,
        "capability": "{}.{}".format(*device.capability) if device.kind == "cuda" else None,
        "memory": memory,
    }


def problems_json(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [asdict(problem) for problem in problems]


def error_json(error: FusedQError) -> dict[str, Any]:
    problems = error.problems if isinstance(error, PreflightError) else ()
    return {
        "type": type(error).__name__,
        "message": str(error),
        "problems": problems_json(problems),
    }


def write_document(path: Path, content: dict[str, Any]) -> None:
    """Write a document so that a reader never sees half of it.

    Raises:
        OSError: the directory does not exist or cannot be written.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def _declared_json(use: Use) -> dict[str, Any] | None:
    """The launch of another kernel than the one that the plan names."""
    if use.beside is None:
        return None
    tokens, launch = use.beside
    sizes = {"min_tokens": tokens, "workspace_bytes": use.scratch_bytes(tokens)}
    return _launch_json(launch) | sizes


def _launch_json(launch: Launch) -> dict[str, Any]:
    tile = asdict(launch.tile) if launch.tile else None
    return {"kernel": launch.kernel, "tile": tile, "source": launch.source}
