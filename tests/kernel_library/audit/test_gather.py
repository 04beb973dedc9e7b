"""What the compiler makes of the gather, for several GPUs, without one."""

import json
from dataclasses import replace

import pytest

from fusedq_kernels.audit.gather import GatherRow

# Most decoders, every kind of step, and a GPU of each generation.
RUNS = (
    ("sm_80", "uint4", "bfloat16", 8, False),
    ("sm_90", "uint4b8", "float16", 128, False),
    ("sm_90", "uint8", "bfloat16", 32, True),
    ("sm_100", "uint8b128", "bfloat16", 65536, False),
    ("sm_120", "nf4", "float16", 64, False),
)
SCRIPT = """
import json, sys, torch
from fusedq_kernels.audit import gather as audit
from fusedq_kernels.types import WeightType
rows = []
for target, weight_type, dtype, group_size, perm in json.loads(sys.argv[1]):
    types, dtypes = [WeightType(weight_type)], [getattr(torch, dtype)]
    rows += audit.audit_gather(target, types, dtypes, [group_size], perm)
print(json.dumps([row.as_json() for row in rows]))
"""


def test_no_variant_spills_or_loads_narrowly(compiling) -> None:
    rows = json.loads(compiling(SCRIPT, json.dumps(RUNS)))
    assert len(rows) == len(RUNS)
    assert {(tuple(row["problems"]), row["mma"], row["hazards"]) for row in rows} == {((), "", 0)}
    coarse = [row for row in rows if row["group_size"] >= 64]
    # An H200 moves 2 bytes of output a value: about 50 instructions' worth of its issue slots
    assert max(row["instructions_per_value"] for row in coarse) < 24


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stack": 8}, "spills"),
        ({"local": 2}, "spills"),
        ({"registers": 256}, "spills"),
        ({"smem": 1 << 20}, "shared memory"),
        ({"hazards": 1}, "1 registers touched under a running wgmma"),
        ({"wide_loads": 0}, "narrow loads of packed words"),
    ],
)
def test_every_problem_is_named(changes: dict[str, int], problem: str) -> None:
    row = GatherRow(
        **{"target": "sm_90", "weight_type": "uint4", "act_dtype": "fp16", "group_size": 128},
        **{"scale_dtype": "fp16", "mma": "", "hazards": 0},
        **{"registers": 53, "stack": 0, "smem": 2048, "local": 0},
        **{"has_perm": False, "instructions": 261, "wide_loads": 1},
    )
    assert row.problems == ()
    assert replace(row, **changes).problems == (problem,)
