"""What is compiled ahead is found by launches, in threads, whatever becomes of the cache."""

import re

# Counts compilations; `Driver` is the one of the fixture.
SCRIPT = """
import logging, os, sys
from pathlib import Path
import torch
from fusedq_kernels import catalogue, types, warmup
from fusedq_kernels.choose.device import device_by_name
from fusedq_kernels.cuda import ahead
from fusedq_kernels.layouts import packing

logging.basicConfig(format="%(message)s")
hits = []
triton.knobs.compilation.listener = lambda **facts: hits.append(facts["cache_hit"])
act, spec = torch.float16, types.QuantSpec(types.WeightType.UINT4B8, 128, torch.float16)
tiles = [types.TileConfig(16, 64, 1, 4, 2), types.TileConfig(32, 64, 1, 4, 2)]

def work(device="meta"):
    # Two layers and two tiles: two binaries
    for n in (256, 512):
        packed = packing.empty_packed(types.Layout.P4, n, 512, spec, 0, act, device)
        for tile in tiles:
            reached = warmup.Reached(types.Launch("triton-gemm", tile, "test"), 3)
            warmup.run_once(reached, catalogue.TRITON_GEMM, packed, act)

def compile_ahead():
    hits.clear()
    compiler = ahead.AheadCompiler(work)
    compiler.wait()
    print(sorted(hits), compiler.cache)
    return compiler

def forget():
    from fusedq_kernels.cuda.gemm_kernel import fused_gemm_kernel
    fused_gemm_kernel.device_caches.clear()
"""

CACHED = """
folder = Path(sys.argv[1])
os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
compile_ahead()
asked = []
triton.knobs.runtime.jit_cache_hook = lambda **facts: asked.append(1)
work()
assert not asked
# Another process finds them on the disk.
triton.knobs.runtime.jit_cache_hook = None
forget()
compile_ahead()
# So does one that cannot write there.
ahead._writable = lambda folder: False
forget()
compiler = compile_ahead()
assert compiler.cache != folder / "cache"
assert len(list(compiler.cache.iterdir())) >= 2
"""

NOWHERE = """
Path(sys.argv[1], "file").touch()
os.environ["TRITON_CACHE_DIR"] = str(Path(sys.argv[1], "file", "cache"))
compile_ahead()
"""

UNREADABLE = """
os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
def denied(self):
    raise PermissionError(self)
ahead._writable, Path.iterdir, Path.is_dir = lambda folder: False, denied, denied
compile_ahead()
"""

BROKEN = """
os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
from triton.backends.nvidia import compiler
def broken(self, *_):
    raise RuntimeError("ptxas went away")
compiler.CUDABackend.make_cubin = broken
compile_ahead()
try:
    work("cpu")
except RuntimeError as error:
    print(error)

def work():
    raise ValueError("no such tile")
compile_ahead()
"""


def test_launches_share_binaries_and_find_them(compiling, tmp_path) -> None:
    first, again, elsewhere = compiling(SCRIPT + CACHED, str(tmp_path), driver=True).splitlines()
    assert first == f"[False, False] {tmp_path}/cache"
    assert again == f"[True, True] {tmp_path}/cache"
    assert re.fullmatch(r"\[True, True\] \S*/fusedq-triton-\w+", elsewhere)


def test_a_cache_that_cannot_be_made_is_replaced(compiling, tmp_path) -> None:
    (line,) = compiling(SCRIPT + NOWHERE, str(tmp_path), driver=True).splitlines()
    assert re.fullmatch(r"\[False, False\] \S*/fusedq-triton-\w+", line)


def test_a_cache_that_cannot_be_read_is_replaced(compiling, tmp_path) -> None:
    (line,) = compiling(SCRIPT + UNREADABLE, str(tmp_path), driver=True).splitlines()
    assert re.fullmatch(r"\[False, False\] \S*/fusedq-triton-\w+", line)


def test_what_does_not_compile_is_left_to_the_launch(compiling, tmp_path) -> None:
    lines = compiling(SCRIPT + BROKEN, str(tmp_path), driver=True).splitlines()
    assert lines == [f"[] {tmp_path}", "ptxas went away", f"[] {tmp_path}"]
