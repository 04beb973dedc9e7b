"""What is launched by a kept kernel is what the JIT launches: the same function and arguments."""

# A driver that hands launches to a list; `Driver` is the one of the fixture.
SCRIPT = """
import torch
from triton.tools.tensor_descriptor import TensorDescriptor
from fusedq_kernels import testing
from fusedq_kernels.call import Call
from fusedq_kernels.cuda import gemm_kernel, sliced
from fusedq_kernels.layouts import packing
from fusedq_kernels.prepared import prepared
from fusedq_kernels.types import QuantSpec, TILED_LAYOUTS, TileConfig, WeightType

launches = []

class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name, *_):
        return 1, name, 100, 0, 1024

    def __getattr__(self, name):
        return lambda *_, **__: 0

class Recorder(Driver):
    utils = Utils()

    def launcher_cls(self, source, metadata):
        return lambda *arguments: launches.append(arguments)

triton.runtime.driver.set_active(Recorder())
act = torch.bfloat16

def same(one, other):
    if isinstance(one, TensorDescriptor):
        return same(one.base, other.base) and one.shape == other.shape
    if isinstance(one, torch.Tensor):
        # Partial sums are allocated anew
        return one is other or (one.shape, one.dtype) == (other.shape, torch.float32)
    if hasattr(one, "get"):
        return one.get()["name"] == other.get()["name"]
    return type(one) is type(other) and one == other

def check(run, *operands):
    launches.clear()
    for _ in range(3):
        run(*operands)
    each = len(launches) // 3
    for number, other in enumerate(launches[each:]):
        one = launches[number % each]
        assert len(one) == len(other) > 15
        assert all(map(same, one, other)), (one, other)

TILES = (
    TileConfig(8, 128, 4, 4, 4),
    TileConfig(64, 128, 1, 8, 4),
    TileConfig(128, 128, 1, 4, 2, scale_weights=True, x_descriptor=True),
)
for weight_type in (WeightType.UINT4, WeightType.NF4):
    spec = QuantSpec(weight_type, 128, torch.float16)
    packed = packing.pack(
        testing.random_logical(256, 1024, spec), TILED_LAYOUTS[weight_type], act
    )
    weight = (packed.qweight, packed.scales, packed.zeros)
    bias = torch.zeros(256, dtype=act)
    ready = prepared(Call.of(packed, "triton-gemm", act).text)
    for tile in TILES:
        run = ready.launched("triton-gemm", tile)
        x, out = (torch.zeros((5, width), dtype=act) for width in (1024, 256))
        for added in (None, bias):
            check(run, x, *weight, added, out)
    write = sliced._dequantizer(spec, 256, 1024, 0, act)
    check(write, *weight[:2], out.new_zeros(100, 1024), 128)
    ids = torch.zeros(9, dtype=torch.int64)
    rows = torch.zeros((9, 1024), dtype=act)
    lookup = prepared(Call.of(packed, "triton-gather", act).text).run(ids.device, 9)
    check(lookup, ids, *weight, None, rows)
    check(lookup, ids, *weight, torch.arange(1024, dtype=torch.int32), rows)

# Where 16 does not divide a pointer the JIT is asked, for another binary.
run = ready.launched("triton-gemm", TILES[1])
cache = gemm_kernel.fused_gemm_kernel.device_caches[0][0]
known = len(cache)
odd = torch.zeros(5 * 256 + 1, dtype=act)[1:].view(5, 256)
run(x, *weight, None, odd)
assert len(cache) == known + 1
run(x, *weight, None, odd)
run(x, *weight, None, out)
assert len(cache) == known + 1

# Profilers see every launch.
seen = []
triton.knobs.runtime.launch_enter_hook = lambda metadata: seen.append(metadata.get()["name"])
launches.clear()
run(x, *weight, None, out)
(launch,) = launches
metadata, entered = launch[6:8]
entered(metadata)
assert seen == ["fused_gemm_kernel"], seen
print("checked")
"""


def test_a_kept_kernel_is_launched_as_the_jit_launches_it(compiling) -> None:
    assert compiling(SCRIPT, driver=True) == "checked\n"
