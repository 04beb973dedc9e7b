"""What an installed but unused plugin adds to the start of every vLLM process.

    python benchmarks/bench_startup.py

Times `register()` in fresh processes that have imported what vLLM itself imports before it loads
its plugins and before any engine exists, and lists the modules that only the plugin brings.
"""

import argparse
import json
import statistics
import subprocess
import sys

CHILD = """
import json, sys, time
import vllm
import vllm.engine.arg_utils
import vllm.model_executor.layers.quantization
import vllm.model_executor.layers.linear
before = set(sys.modules)
start = time.perf_counter()
import vllm_fusedq
vllm_fusedq.register()
seconds = time.perf_counter() - start
new = sorted(set(sys.modules) - before)
print("RESULT " + json.dumps([seconds, new]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    seconds, modules = [], []
    for _ in range(repeats):
        out = subprocess.run(
            [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True
        )
        line = next(x for x in out.stdout.splitlines() if x.startswith("RESULT "))
        elapsed, modules = json.loads(line.removeprefix("RESULT "))
        seconds.append(elapsed)
    outside = [m for m in modules if not m.startswith(("vllm_fusedq", "fusedq_kernels"))]
    print(f"register(): median {statistics.median(seconds) * 1e3:.1f} ms of {repeats} processes")
    print(f"modules imported: {len(modules)}, not our own: {outside or 'none'}")
    print(f"triton imported by the plugin: {any(m.split('.')[0] == 'triton' for m in modules)}")


if __name__ == "__main__":
    main()
