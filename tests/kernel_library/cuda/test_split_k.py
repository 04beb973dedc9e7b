"""Split-K: the last program to arrive adds the partial sums, in the order of K and no other."""

import json
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedq_kernels import ops, testing
from fusedq_kernels.cuda import arrivals, gemm
from fusedq_kernels.layouts import packing
from fusedq_kernels.types import TILED_LAYOUTS, Launch, QuantSpec, TileConfig, WeightType

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = QuantSpec(WeightType.UINT4, 64, torch.float16)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="streams and graphs need a GPU")

PTX_SCRIPT = """
import json, sys, torch
from fusedq_kernels.audit import compile, fused
from fusedq_kernels.choose import device
from fusedq_kernels.types import QuantSpec, TileConfig, WeightType

spec = QuantSpec(WeightType.UINT4, 128, torch.float16)
target = compile.target_of(device.device_by_name(sys.argv[1]))
kernel = fused.compile_gemm(target, TileConfig(16, 128, 4, 4, 4), spec, torch.float16)
print(json.dumps(kernel.asm["ptx"]))
"""


def launch(split_k, block_m=16, block_n=64) -> Launch:
    tile = TileConfig(block_m, block_n, split_k, num_warps=4, num_stages=2)
    return Launch("triton-gemm", tile, "test")


def on_device(m=5, n=72, k=1040, spec=SPEC):
    """Tokens, packed weight and bias; K is nine blocks, N and M are no multiples of the tile."""
    problem = testing.make_problem(m, n, k, spec, has_bias=True)
    packed = packing.pack(problem.logical, TILED_LAYOUTS[spec.weight_type], torch.float16)
    moved = {name: getattr(packed, name).to(DEVICE) for name in ("qweight", "scales")}
    packed = type(packed)(
        *(moved["qweight"], moved["scales"], None, packed.layout, spec, packed.n, packed.k)
    )
    return problem.x.to(DEVICE), packed, problem.bias.to(DEVICE)


@pytest.fixture
def partial_sums(monkeypatch):
    """Every workspace that `fused_gemm` allocates; `keep` makes it return one of them again."""

    class Workspaces(list):
        keep = None

    seen = Workspaces()
    allocate = torch.empty

    def empty(shape, **kwargs):
        if len(shape) != 3:
            return allocate(shape, **kwargs)
        if seen.keep is None:
            seen.append(allocate(shape, **kwargs).fill_(torch.nan))
        return seen[-1] if seen.keep is None else seen.keep

    monkeypatch.setattr(gemm.torch, "empty", empty)
    return seen


@pytest.mark.skipif(DEVICE == "cuda", reason="the order of arrival is the interpreter's")
@pytest.mark.parametrize("last", range(5))
def test_whichever_split_arrives_last_the_sum_is_the_same(partial_sums, last):
    x, packed, bias = on_device()
    expected = ops.run(x, packed, bias, launch(5))
    (whole,) = partial_sums
    # The interpreter runs the splits in order. With 4 - last of them counted in before the start,
    # split `last` completes the tile; the sums of the later ones are already there.
    counters = arrivals.arrival_counters(x.device)
    counters[:2] = 4 - last
    partial_sums.keep = whole.clone()
    partial_sums.keep[: last + 1] = torch.nan
    assert torch.equal(ops.run(x, packed, bias, launch(5)), expected)
    assert counters[:2].tolist() == [4 - last] * 2
    counters.zero_()


def test_partial_sums_are_those_of_each_part_of_k(partial_sums):
    spec = QuantSpec(WeightType.UINT4B8, 128, torch.float16)
    x, packed, _ = on_device(n=64, k=1024, spec=spec)
    ops.run(x, packed, None, launch(4))
    (parts,) = partial_sums
    weight = packing.unpack(packed)
    values = (weight.codes.double() - 8) * weight.scales.double().repeat_interleave(128, 1)
    for index, part in enumerate(parts):
        rows = slice(256 * index, 256 * (index + 1))
        expected = x[:, rows].double() @ values[:, rows].t()
        testing.assert_close(part, expected, max_error=1e-5, rms_error=1e-6)


def test_counters_lie_outside_the_memory_pool_of_the_first_launch():
    class Pool(TorchDispatchMode):
        """Sees, as `torch.cuda.use_mem_pool` does, what its own thread allocates."""

        allocated = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.allocated += 1
            return func(*args, **(kwargs or {}))

    with Pool() as pool:
        counters = arrivals._rows.__wrapped__(torch.device(DEVICE))[0]
        inside = pool.allocated
        torch.zeros(1)
    assert (inside, pool.allocated) == (0, 1)
    assert counters.shape == (arrivals.MAX_STREAMS, arrivals.MAX_TILES)
    assert not counters.any()


def test_counters_are_zero_after_every_launch():
    x, packed, bias = on_device(m=17, n=136)
    counters = arrivals.arrival_counters(x.device)
    for split_k in (2, 9, 3):
        ops.run(x, packed, bias, launch(split_k))
        assert not counters.any()


@pytest.mark.parametrize("split_k", [2, 3, 9])
def test_the_same_bits_on_every_run(split_k):
    x, packed, bias = on_device(m=17)
    first = ops.run(x, packed, bias, launch(split_k))
    for _ in range(100 if DEVICE == "cuda" else 2):
        assert torch.equal(ops.run(x, packed, bias, launch(split_k)), first)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_partial_sums_are_published_before_they_are_counted(target, compiling):
    ptx = json.loads(compiling(PTX_SCRIPT, target))
    atomics = re.findall(r"\b(?:atom|red)\.\S+", ptx)
    assert atomics == ["atom.global.gpu.acq_rel.add.u32"]
    before, after = ptx.split(atomics[0])
    # A barrier of the block between the last store of a sum and the add, and between the add and
    # the first load of a sum.
    assert "bar.sync" in before[before.rindex("st.global") :]
    loads = [match.start() for match in re.finditer(r"ld\.global\.cg", after)]
    assert loads
    assert "bar.sync" in after[: loads[0]]
    assert "ld.global.cg" not in before


def test_too_many_tiles_to_split_are_refused():
    x, packed, _ = on_device(m=arrivals.MAX_TILES + 1)
    with pytest.raises(ValueError, match=r"split_k 2 of 16385 output tiles; at most 16384"):
        ops.run(x, packed, None, launch(2, block_m=1, block_n=128))


def test_every_stream_counts_for_itself():
    device = torch.device(DEVICE)
    arrivals._row.cache_clear()
    arrivals._rows.cache_clear()
    rows = [arrivals._row(device, stream) for stream in range(arrivals.MAX_STREAMS)]
    rows[3].fill_(1)
    assert [row.sum().item() for row in rows].count(0) == arrivals.MAX_STREAMS - 1
    assert arrivals._row(device, 3).data_ptr() == rows[3].data_ptr()
    assert all(row.shape == (arrivals.MAX_TILES,) for row in rows)
    with pytest.raises(RuntimeError, match="more than 64 streams"):
        arrivals._row(device, arrivals.MAX_STREAMS)
    arrivals._row.cache_clear()
    arrivals._rows.cache_clear()


def test_counters_are_not_made_while_capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run the model once before capturing it"):
        arrivals._rows(torch.device("cuda", 7))


@needs_gpu
def test_streams_and_graphs_do_not_disturb_each_other():
    x, packed, bias = on_device(m=8, n=512, k=4096)
    expected = ops.run(x, packed, bias, launch(8))
    torch.cuda.synchronize()
    graphs = []
    for _ in range(2):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            y = ops.run(x, packed, bias, launch(8))
        graphs.append((torch.cuda.Stream(), graph, y))
    results = []
    for _ in range(50):
        for stream, graph, _ in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
        results.append(ops.run(x, packed, bias, launch(8)))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)
    assert all(torch.equal(y, expected) for _, _, y in graphs)
