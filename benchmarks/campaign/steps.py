"""The steps, by name: `FIRST` in the order of what settles most, then all that takes longer.

Predictions of steps that run experiments are those of `gemmbench/experiments.py`.
"""

from functools import partial

from campaign import verdicts
from campaign.step import Command, Step
from gemmbench.experiments import EXPERIMENTS

_SANITIZE = "compute-sanitizer --error-exitcode 9 --tool"
_TINY = "kernels_correct.py --tiny"
_TUNED = "--shapes llama-3-8b --shapes qwen2.5-7b --shapes qwen2.5-32b"
_COMPARED = (
    "--shapes llama-3-8b --shapes llama-3-70b --shapes qwen2.5-7b --shapes qwen2.5-72b "
    "--shapes tiny-gemm --shapes published"
)
_TYPES = "--weight-type uint4 --weight-type uint8b128 --weight-type nf4"
_RIVALS = " ".join(
    f"--contender {name}"
    for name in ("fusedq", "fusedq-sliced", "marlin", "machete", "bitsandbytes")
)
_FEW_TOKENS = " ".join(f"--m {m}" for m in (1, 16, 64, 128, 512, 2048, 8192))
_RULES = "kernels/fusedq_kernels/choose/tiles.py"


def _experiments(*numbers: int, changes: str, limit: float = 540, dry: str = "") -> Step:
    """A step of experiments, each with its own prediction."""
    return Step(
        " ".join(EXPERIMENTS[number].title for number in numbers),
        (Command(f"experiments.py {' '.join(map(str, numbers))}", dry=dry),),
        "; ".join(f"{number}: {EXPERIMENTS[number].prediction}" for number in numbers),
        changes,
        partial(_answers, numbers=numbers),
        limit,
    )


def _answers(folder, numbers: tuple[int, ...]) -> list[str]:
    return [line for number in numbers for line in verdicts.variants(folder, number)]


def _serve(model: str, layout: str, *sides: str, prediction: str) -> Step:
    wanted = " ".join(f"--side {side}" for side in ("fusedq", "stock", *sides))
    return Step(
        f"{model} as {layout} inside vLLM, engines side by side, measured one after the other",
        (
            Command(
                f"serve_compare.py --work {{work}} --together --model {model} --layout {layout} "
                f"{wanted}"
            ),
        ),
        prediction,
        "the table of results/<device>/README.md and the README's line on speed; what is slower "
        "than stock is named there",
        verdicts.serving,
        limit=220,
    )


FIRST: dict[str, Step] = {
    "gate": Step(
        "the first kernels are right and start soon",
        (Command("gate.py"),),
        "4 weight types at 1, 16, 64 and 512 tokens right, the first within 20 s",
        "nothing else runs: kernels that are wrong or slow to start come first",
        limit=90,
        gate=True,
    ),
    "right": Step(
        "every kernel against float64, on all processors; what is timed later compiles beside it",
        (
            Command("kernels_correct.py --jobs {jobs}", dry="--weight-type uint4b8 --shard 0/4"),
            Command("prewarm.py --jobs {rest}", dry="--jobs 1"),
        ),
        "0 wrong outputs in 488 checks; RMS error 1.65e-3 in bf16, 2.1e-4 in fp16",
        "a tile that is wrong leaves " + _RULES + "; README: the checks that passed",
        verdicts.checks,
        limit=240,
        together=True,
    ),
    "tiles": _experiments(9, changes=f"the prefill rules of wgmma in {_RULES}", limit=90),
    "small": _experiments(
        10,
        changes=f"the share of sums in choose/waves.py, the splits of {_RULES}, the shift in "
        "cuda/ptx.py",
        limit=60,
    ),
    "specialised": _experiments(
        11,
        changes="where it is right and 3 % ahead it becomes a kernel of kernels/fusedq_kernels/"
        "cuda and a rule; where not, its files go",
        limit=75,
    ),
    "launch": Step(
        "what a layer call outside a CUDA graph costs the processor",
        (Command("bench_launch.py --csv {out}/launch.csv"),),
        "10 to 15 us a call, 6 to 9 of them Triton's launcher; torch.mm 5 to 8",
        "results/<device>/README.md on prefill of 512 tokens, which the processor limits; above "
        "20 us cuda/launcher.py",
        verdicts.launches,
        limit=40,
    ),
    "serve-gptq": _serve(
        *("llama-3-8b", "gptq", "marlin"),
        prediction="1.5 of stock at batch 1 and 8, 1.3 at 16, 1.2 at 32 and 64, 1.0 at 128 and "
        "256; prefill of 512 tokens 0.8, of 2048 0.95, of 8192 0.9",
    ),
    "serve-awq": _serve(
        *("llama-3-8b", "awq"),
        prediction="as GPTQ within 3 %: zero points cost no instruction in the loop of 4 bits",
    ),
    "serve-bias": _serve(
        *("qwen2.5-7b", "gptq"),
        prediction="as Llama within 5 %: the bias of qkv is added in the kernel",
    ),
    "serve-w8": _serve(
        *("llama-3-8b", "w8a16"),
        prediction="1.25 of stock at batch 1 and 8, 1.0 from 64 on, prefill 0.9",
    ),
    "serve-nf4": _serve(
        *("llama-3-8b", "nf4", "bf16"),
        prediction="twice stock's bitsandbytes at batch 1 where the installed vLLM has it; 1.5 of "
        "bf16 at batch 1, 0.8 at 64",
    ),
    "load": Step(
        "decoding and packing on the GPU, the copy from host memory included",
        (Command("bench_load.py --on cuda --csv {out}/load.csv", dry="--on cpu --only gemv"),),
        "at least 10 GB/s of packed weight for every format",
        "README on loading; a format below 2 GB/s gets its decoding looked at",
        verdicts.loading,
        limit=40,
    ),
    "compare": Step(
        "int4, 8 bits and NF4 beside everything else",
        (
            Command(f"bench_gemm.py {_FEW_TOKENS} {_RIVALS}", dry="--phase decode"),
            Command(f"bench_gemm.py {_FEW_TOKENS} {_RIVALS} {_TYPES}", dry="--phase decode"),
        ),
        "4 bits 1.4 times Marlin at 1 and 16 tokens, 1.15 times the best of Marlin and Machete at "
        "64 and 128, 0.8 of Machete at 512; 8 bits 1.25 times Marlin; NF4 within 15 % of 4-bit "
        "integers",
        "the kernel table of results/<device>/README.md and the README's claims",
        verdicts.kernels,
        limit=150,
    ),
}
LONGER: dict[str, Step] = {
    "predict": Step("the roofline, before anything", (Command("bench_gemm.py --roofline"),)),
    "sane": Step(
        "no access out of bounds, no race, nothing read before it is written",
        (
            Command(f"{_TINY} --weight-type uint4b8", f"{_SANITIZE} memcheck"),
            Command(f"{_TINY} --weight-type uint4b8", f"{_SANITIZE} racecheck"),
            Command(f"{_TINY} --weight-type uint4b8", f"{_SANITIZE} initcheck"),
            Command(_TINY, f"{_SANITIZE} memcheck"),
        ),
    ),
    "bits": Step("bit-equality of tiles, accumulation", (Command("experiments.py 3 5"),)),
    "bound": _experiments(1, changes="the decoder that cuda/decode.py names"),
    "tail": _experiments(4, changes="the share of sums in choose/waves.py"),
    "prefill": _experiments(2, 7, changes=f"the prefill rules of {_RULES}"),
    "types": _experiments(6, 8, changes="results/<device>/README.md on other weight types"),
    "tune": Step("rows for what is served most", (Command(f"tune.py {_TUNED}"),)),
    "tune-types": Step(
        "rows for other weight types", (Command(f"tune.py --shapes llama-3-8b {_TYPES}"),)
    ),
    "compare-all": Step("int4 beside everything else", (Command(f"bench_gemm.py {_COMPARED}"),)),
    "compare-types": Step(
        "the other weight types and fp16 beside everything else",
        (
            Command(f"bench_gemm.py {_TYPES}"),
            Command("bench_gemm.py --weight-type uint8b128 --group-size -1"),
            Command("bench_gemm.py --act-dtype float16"),
        ),
    ),
    "experts": Step(
        "experts: bit for bit the plain kernel's, and beside vLLM's",
        (
            Command(
                "-m pytest -q tests/kernel_library/cuda/test_routing.py "
                "tests/kernel_library/cuda/test_grouped.py "
                "tests/kernel_library/cuda/test_experts.py"
            ),
            *(
                Command(f"bench_experts.py {of}", dry="--contender fusedq --m 1")
                for of in (
                    "--model qwen3-30b-a3b --model mixtral-8x7b",
                    "--model kimi-k2 --tp 8",
                    "--model kimi-k2 --ep 8",
                )
            ),
        ),
    ),
    "light": Step(
        "real checkpoints in real vLLM answer as their producing libraries",
        (
            Command("-m pytest -q tests/engine/test_server.py -k producing_library"),
            Command("-m pytest -q tests/engine/test_mixed_widths.py"),
        ),
    ),
    "honest": Step(
        "which kernels the profiler sees in vLLM, and what they allocate",
        (
            Command("-m vllm_fusedq.cli verify tests/assets/tiny-llama-awq-g128"),
            Command("random_checkpoint.py llama-3-8b gptq {work}/llama-3-8b-gptq"),
            Command("-m vllm_fusedq.cli verify {work}/llama-3-8b-gptq"),
        ),
    ),
    "serve": Step(
        "inside vLLM, four sides, one engine at a time",
        (Command("serve_compare.py --work {work} --model llama-3-8b"),),
        verdict=verdicts.serving,
    ),
    "serve-more": Step(
        "larger models, other layouts",
        (
            Command("serve_compare.py --work {work} --model qwen2.5-7b --model qwen2.5-32b"),
            Command(
                "serve_compare.py --work {work} --model llama-3-8b --layout awq "
                "--layout compressed-tensors"
            ),
        ),
        verdict=verdicts.serving,
    ),
    "plots": Step("the figures", (Command("plots.py {out}"),)),
}
STEPS = {**FIRST, **LONGER}
