"""After the warm-up no number of tokens, stride or bias asks the compiler for anything."""

# The JIT looks a launch up and, where it would compile, tells the hook instead.
SCRIPT = """
import dataclasses
import torch
from fusedq_kernels.choose import device
from fusedq_kernels import catalogue, ops, warmup
from fusedq_kernels.choose import heuristics
from fusedq_kernels.layouts import packing
from fusedq_kernels.choose import slices
from fusedq_kernels import testing, types
from fusedq_kernels.choose import tuned_file

asked = []

def note(key, compile, **_):
    # Triton 3.6 describes no other constant to a hook, of which vLLM sets one.
    assert all(isinstance(value, (str, int, float, triton.language.dtype, type(None)))
               for value in compile["constants"].values()), compile["constants"]
    asked.append(key)
    return True

def run_all(kernel, weight, with_bias=(False,), policy=types.DEFAULT_POLICY):
    launches = list(
        warmup.reachable(kernel, weight, h200, 700, with_bias=with_bias, policy=policy)
    )
    for reached in launches:
        warmup.run_once(reached, kernel, weight, act)
    return len(launches)

triton.knobs.runtime.jit_cache_hook = note
h200 = device.device_by_name("h200")
act = torch.bfloat16
for weight_type, group_size, n, k, phase in (
    (types.WeightType.UINT4, 128, 1096, 1424, 64),
    (types.WeightType.NF4, 64, 512, 2048, 0),
    (types.WeightType.UINT8B128, 48, 2304, 512, 16),
):
    spec = types.QuantSpec(weight_type, group_size, torch.float16)
    target = types.TILED_LAYOUTS[weight_type]
    packed = packing.pack(testing.random_logical(n, k, spec, phase), target, act)
    for batch_invariant in (False, True):
        asked.clear()
        policy = types.Policy(batch_invariant)
        nothing = packing.empty_packed(target, n, k, spec, phase, act, "meta")
        run_all(catalogue.TRITON_GEMM, nothing, (False, True), policy)
        ahead = set(asked)
        asked.clear()
        count = run_all(catalogue.TRITON_GEMM, packed, (False, True), policy)
        known = set(asked)
        # What is compiled ahead is what the warm-up runs.
        assert ahead == known
        assert count == len(asked) == len(known) > 3, (count, len(known))
        wide = torch.zeros(700, k + 64, dtype=act)
        bias = torch.zeros(n + 1, dtype=act)
        for m in range(1, 701):
            shape = types.GemmShape(m, n, k)
            launch = heuristics.select(shape, spec, h200, policy)
            tokens = wide[:m, 32 : k + 32] if m % 2 else torch.zeros(m, k, dtype=act)
            ops.run(tokens, packed, (None, bias[1:], bias[:-1])[m % 3], launch)
        assert set(asked) == known, set(asked) - known
        # Another launch than those of the warm-up would have been noticed.
        other = types.Launch(launch.kernel, types.TileConfig(16, 128, 1, 4, 2), "test")
        ops.run(tokens, packed, None, other)
        assert len(set(asked)) == len(known) + 1

# A sliced launch is warmed up for every slice, token count and bias alike.
cells = {"weight_type": weight_type, "group_size": group_size, "n": n, "k": k}
tile = types.TileConfig(16, 64, 1, 4, 3)
rows = [
    tuned_file.TunedRow(*cells.values(), 64, "triton-gemm", tile, 9.0),
    tuned_file.TunedRow(*cells.values(), 512, "triton-gemm", tile, 9.0),
    tuned_file.TunedRow(*cells.values(), 512, "sliced-cublas", None, 5.0),
]
table = tuned_file.TunedTable("h200", "3.9.0", "", "", tuple(rows))
real = heuristics.reachable_launches
kernel = dataclasses.replace(
    catalogue.TRITON_GEMM, tiled_launches=lambda *a: real(*a, table_for=lambda device: table)
)
slices.SLICE_BYTES = 2 * k * 1000
found = {}
nothing = packing.empty_packed(target, n, k, spec, phase, act, "meta")
for allowed, weight in ((False, packed), (True, packed), (None, nothing)):
    asked.clear()
    policy = types.Policy(sliced_prefill=allowed is not False)
    run_all(kernel, weight, (False, True), policy)
    found[allowed] = set(asked)
known = found[True]
assert len(known - found[False]) == 1
assert found[None] == known
launch = types.Launch("sliced-cublas", None, "test")
for limit in (1000, 333, 4000):
    slices.SLICE_BYTES = 2 * k * limit
    for m in (65, 300, 512):
        ops.run(torch.zeros(m, k, dtype=act), packed, None, launch)
assert set(asked) == known

nothing = dataclasses.replace(nothing, phase=0)
asked.clear()
run_all(catalogue.TRITON_GATHER, nothing)
(ahead,) = asked
asked.clear()
ids = torch.zeros(701, dtype=torch.int64)
whole = dataclasses.replace(packed, phase=0)
for first, m in ((0, 1), (0, 16), (1, 17), (1, 700)):
    ops.embedding(ids[first : first + m], whole, "triton-gather", act)
assert len(asked) == 4
assert set(asked) == {ahead}
"""


def test_serving_compiles_nothing_after_the_warm_up(compiling):
    compiling(SCRIPT, driver=True)
