"""Result files with known numbers, as a GPU run would write them."""

from pathlib import Path

from gemmbench.results import ResultFile

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
# Microseconds per kernel as a factor of the packed bytes' streaming time at 4 TB/s.
DECODE_FACTORS = {
    "fusedq": 1.15,
    "cublas": 4.3,
    "dequant+cublas": 9.5,
    "marlin": 1.6,
    "machete": 1.9,
    "load-only": 1.05,
    "without-dequant": 1.1,
    "dequant-twice": 1.45,
}
PREFILL_TFLOPS = {"fusedq": 600.0, "cublas": 750.0, "dequant+cublas": 0.0, "machete": 640.0}


def streaming_us(n: int, k: int) -> float:
    """Microseconds to read the packed weight at 4 TB/s."""
    return n * k * 0.53 / 4e6


def write_results(folder: Path) -> None:
    """gemm_decode.csv and gemm_prefill.csv with the same kernels, shapes and columns as a run."""
    decode, prefill = (
        ResultFile(folder / "gemm_decode.csv"),
        ResultFile(folder / "gemm_prefill.csv"),
    )
    for n, k in SHAPES:
        for m in (1, 4, 16, 64):
            base = streaming_us(n, k) * (1 + m / 128)
            times = {kernel: base * factor for kernel, factor in DECODE_FACTORS.items()}
            decode.append(_rows(n, k, m, times), {"device": "none", "note": "made up"})
        for m in (128, 512, 2048, 8192):
            flops = 2 * m * n * k
            times = {name: flops / rate / 1e6 for name, rate in PREFILL_TFLOPS.items() if rate}
            times["dequant+cublas"] = times["cublas"] + n * k * 4.5 / 4e6
            prefill.append(_rows(n, k, m, times), {"device": "none", "note": "made up"})


def _rows(n: int, k: int, m: int, times: dict[str, float]) -> list[dict[str, object]]:
    twin = times.get("load-only")
    return [
        {
            **{"weight_type": "uint4b8", "group_size": 128, "act_dtype": "bfloat16"},
            **{"n": n, "k": k, "m": m, "layers": "made-up", "kernel": kernel, "us": round(us, 4)},
            **{"weight_gbs": n * k * 0.53 / us / 1e3, "vs_cublas": times["cublas"] / us},
            "pct_twin": 100 * twin / us if twin else "",
        }
        for kernel, us in times.items()
    ]
