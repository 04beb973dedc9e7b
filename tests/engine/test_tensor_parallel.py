"""Two ranks on one CPU: the same resident weights bit for bit, the same answers but rounding."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import replace, write_checkpoint
from engines import SMALL_CACHE, generate, get, mean_error, prompt_logprobs
from local_server import serving
from tiny_models import UNQUANTIZED, asset, reference

pytestmark = pytest.mark.engine

TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def run(folder: Path, model: Path, prompts: list[list[int]], tp_size: int) -> tuple[Any, Any]:
    """Answers, and each module's resident codes, zeros and scales put together from all ranks."""
    dump = folder / f"tp{tp_size}"
    dump.mkdir()
    answers = generate(
        folder,
        model,
        prompts,
        dump=dump,
        env=TWO_RANKS if tp_size == 2 else None,
        quantization="fusedq",
        tensor_parallel_size=tp_size,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        dtype="bfloat16",
    )
    ranks = [torch.load(dump / f"rank{rank}.pt") for rank in range(tp_size)]
    return answers, whole_modules(ranks)


def whole_modules(ranks: list[dict[str, Any]]) -> dict[str, dict[tuple[int, int], tuple]]:
    """module -> {(n, k): (code, zero, scale)} as tensors over the whole module."""
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for rank in ranks:
        for weights in rank.values():
            offset = 0
            for module, n_start, n_stop, k_start, k_stop in weights["parts"]:
                rows = slice(offset, offset + n_stop - n_start)
                offset += n_stop - n_start
                g = weights["group_size"]
                group = torch.arange(k_start, k_stop) // g - k_start // g
                values = {"codes": weights["codes"][rows].short()}
                values["scales"] = weights["scales"][rows][:, group]
                if weights["zeros"] is not None:
                    values["zeros"] = weights["zeros"][rows][:, group].short()
                for name, value in values.items():
                    target = modules[module].setdefault(name, {})
                    target[n_start, n_stop, k_start, k_stop] = value
    return {
        module: {name: assemble(pieces) for name, pieces in values.items()}
        for module, values in modules.items()
    }


def assemble(pieces: dict[tuple[int, int, int, int], torch.Tensor]) -> torch.Tensor:
    n = max(key[1] for key in pieces)
    k = max(key[3] for key in pieces)
    whole = torch.full((n, k), float("nan"), dtype=torch.float64)
    for (n_start, n_stop, k_start, k_stop), piece in pieces.items():
        whole[n_start:n_stop, k_start:k_stop] = piece.double()
    assert not whole.isnan().any(), "the ranks do not cover the module"
    return whole


def assert_same_weights(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one.keys() == two.keys()
    for module, values in one.items():
        assert values.keys() == two[module].keys()
        for name, value in values.items():
            assert torch.equal(value, two[module][name]), f"{module} {name}"


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    name = "tiny-llama-ct-asym-g32"
    prompts = [prompt["token_ids"] for prompt in reference(name)["prompts"]][:4]
    one, weights_of_one = run(tmp_path, asset(name), prompts, 1)
    two, weights_of_two = run(tmp_path, asset(name), prompts, 2)
    assert_same_weights(weights_of_one, weights_of_two)
    for a, b in zip(one, two, strict=True):
        assert mean_error(a["prompt_logprobs"], b["prompt_logprobs"]) <= 0.03


def test_a_rank_that_starts_inside_a_group(tmp_path: Path) -> None:
    """intermediate 896, group 128: the second rank of a server starts in the middle of group 3."""
    model = tmp_path / "model"
    generator = torch.Generator().manual_seed(0)
    tables = [
        replace(
            f"{name}.weight", lambda t: (torch.randn(t.shape, generator=generator) / 16).to(t.dtype)
        )
        for name in ("model.embed_tokens", "lm_head")
    ]
    write_checkpoint(model, "awq", hidden=256, intermediate=896, group_size=128, edits=tables)
    prompts = [[(7 * i + 3 * j) % 30 for i in range(24)] for j in range(3)]
    one, _ = run(tmp_path, model, prompts, 1)
    arguments = ["--quantization", "fusedq", "--tensor-parallel-size", "2", "--enforce-eager"]
    arguments += ["--served-model-name", "tiny", "--tokenizer", str(asset(UNQUANTIZED))]
    arguments += ["--max-model-len", "128", "--dtype", "bfloat16", *SMALL_CACHE]
    env = TWO_RANKS | {"VLLM_PLUGINS": "fusedq"}
    with serving(model, tmp_path / "server.log", arguments, **env) as server:
        ranks = get(server, "/fusedq/plan")["ranks"]
        two = [prompt_logprobs(server, ids) for ids in prompts]
    phases = [
        next(row["phase"] for row in rank["layers"] if "down_proj" in row["layers"])
        for rank in ranks
    ]
    assert phases == [0, 64]
    for a, b in zip(one, two, strict=True):
        assert mean_error(a["prompt_logprobs"], b) <= 0.03
