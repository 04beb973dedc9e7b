"""The capacity plan against sums done by hand from published sizes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoints import write_checkpoint
from fusedq_kernels.choose.device import MEMORY_BYTES, cpu_device, device_by_name
from published import MODELS, Model, tensors_of, write_headers
from vllm_fusedq.checkpoint.read import Checkpoint, read_checkpoint
from vllm_fusedq.plan.advice import memory_problem, notes_for, warnings_for
from vllm_fusedq.plan.capacity import Capacity, Demand, block_count, capacity_of, stage_ranges
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.plan.model import plan_model
from vllm_fusedq.report.capacity import capacity_table
from vllm_fusedq.report.table import render

LLAMA_8B = MODELS["Llama-3.1-8B"]


def plan(
    path: Path, model: Model, tp: int, demand: Demand, device: str = "h200", fmt: str = "gptq"
) -> tuple[Checkpoint, Capacity]:
    if not (path / "config.json").exists():
        write_headers(path, model, fmt)
    checkpoint = read_checkpoint(path)
    target = Target(device_by_name(device), torch.bfloat16)
    layers = plan_model(checkpoint, target, tp)
    memory = MEMORY_BYTES[device]
    return checkpoint, capacity_of(checkpoint, layers, torch.bfloat16, demand, memory)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_published_model_adds_up(tmp_path: Path, tp: int) -> None:
    _, found = plan(tmp_path, LLAMA_8B, tp, Demand(max_model_len=1000, max_num_seqs=3))
    # Per block: q 4096, k and v 1024 each, o 4096, of 4096; gate, up and down 14336 x 4096
    weights = 32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 14336 * 4096)
    assert found.weights == weights // 2 // tp
    assert found.metadata == weights // 128 * 2 // tp  # one 16-bit scale per group of 128
    # Embeddings and lm_head are cut; 65 norms are not
    assert found.unquantized == 2 * (2 * 128256 * 4096 // tp + 65 * 4096)
    assert found.kv_bytes_per_token == 32 * 2 * (8 // tp) * 128 * 2
    # 1000 tokens lie in 63 blocks of 16
    assert found.kv_bytes_per_sequence == 63 * 16 * found.kv_bytes_per_token
    assert found.kv_cache == 3 * found.kv_bytes_per_sequence
    assert found.budget == int(0.92 * 143771 * 2**20)
    assert found.remains == found.budget - found.fixed - found.kv_cache
    held = (found.budget - found.fixed) * 1000
    assert found.kv_tokens == held // found.kv_bytes_per_sequence


def test_key_value_heads_are_replicated_where_ranks_outnumber_them(tmp_path: Path) -> None:
    _, found = plan(tmp_path, MODELS["Qwen2.5-0.5B"], 2, Demand())
    assert found.kv_bytes_per_token == 24 * 2 * 1 * 64 * 2
    # Tied: no lm_head beside the embeddings; biases of q, k and v are cut with their rows
    embeddings = 151936 * 896 // 2
    assert found.unquantized == 2 * (embeddings + 49 * 896 + 24 * (896 + 128 + 128) // 2)


def test_a_quantized_lm_head_is_weight_and_no_activation(tmp_path: Path) -> None:
    _, plain = plan(tmp_path / "plain", LLAMA_8B, 2, Demand())
    _, packed = plan(tmp_path / "packed", LLAMA_8B, 2, Demand(), fmt="gptq-head")
    assert packed.weights - plain.weights == 128256 * 4096 // 2 // 2
    assert plain.unquantized - packed.unquantized == 2 * 128256 * 4096 // 2
    assert packed.activations == plain.activations


def test_fp8_halves_the_kv_cache(tmp_path: Path) -> None:
    _, wide = plan(tmp_path, LLAMA_8B, 1, Demand())
    _, narrow = plan(tmp_path, LLAMA_8B, 1, Demand(kv_cache_dtype="fp8"))
    assert wide.kv_bytes_per_token == 2 * narrow.kv_bytes_per_token
    assert wide.max_model_len == 131072


def test_pipeline_stages_share_the_model(tmp_path: Path) -> None:
    _, whole = plan(tmp_path, LLAMA_8B, 1, Demand(max_model_len=1000))
    _, fullest = plan(tmp_path, LLAMA_8B, 1, Demand(max_model_len=1000, pipeline_parallel_size=4))
    assert fullest.weights == whole.weights // 4
    assert fullest.kv_cache == whole.kv_cache // 4
    # lm_head and the final norm make the last of equal stages the fullest
    assert fullest.stage == 3
    assert fullest.unquantized == 2 * (128256 * 4096 + (16 + 1) * 4096)


def test_a_tied_embedding_is_on_the_first_and_the_last_stage(tmp_path: Path) -> None:
    _, fullest = plan(tmp_path, MODELS["Qwen2.5-0.5B"], 1, Demand(pipeline_parallel_size=2))
    assert fullest.stage == 1
    biases = 12 * (896 + 128 + 128)
    assert fullest.unquantized == 2 * (151936 * 896 + (24 + 1) * 896 + biases)


def test_every_plain_tensor_counts_once(tmp_path: Path) -> None:
    write_headers(tmp_path, MODELS["Qwen3-8B"], "gptq")
    _, whole = plan(tmp_path, MODELS["Qwen3-8B"], 1, Demand(max_model_len=1))
    stored = tensors_of(MODELS["Qwen3-8B"], "gptq")
    plain = sum(
        2 * torch.Size(shape).numel()
        for name, (_, shape) in stored.items()
        if name.endswith(("norm.weight", "embed_tokens.weight", "lm_head.weight"))
    )
    assert whole.unquantized == plain


@pytest.mark.parametrize(
    ("blocks", "stages", "sizes"),
    [(32, 4, [8, 8, 8, 8]), (126, 4, [31, 32, 32, 31]), (28, 3, [9, 10, 9]), (5, 1, [5])],
)
def test_stages_are_cut_as_vllm_cuts_them(blocks: int, stages: int, sizes: list[int]) -> None:
    from vllm.distributed.utils import get_pp_indices

    found = stage_ranges(blocks, stages)
    assert [stop - start for start, stop in found] == sizes
    assert found == [get_pp_indices(blocks, rank, stages) for rank in range(stages)]


def test_latent_attention_is_one_latent_on_every_rank(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    checkpoint.config.update(kv_lora_rank=512, qk_rope_head_dim=64)
    layers = plan_model(checkpoint, Target(cpu_device(), torch.bfloat16), 2)
    found = capacity_of(checkpoint, layers, torch.bfloat16, Demand(), None)
    assert found.kv_bytes_per_token == (512 + 64) * 2


def test_unknown_sizes_are_unknown_not_zero(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, layers=3)
    checkpoint = read_checkpoint(tmp_path)
    for key in ("hidden_size", "num_hidden_layers", "max_position_embeddings"):
        del checkpoint.config[key]
    assert block_count(checkpoint) == 3
    layers = plan_model(checkpoint, Target(cpu_device(), torch.bfloat16))
    found = capacity_of(checkpoint, layers, torch.bfloat16, Demand(), None)
    assert found.kv_cache is found.kv_bytes_per_token is found.remains is found.budget is None
    text = render(capacity_table(found, Demand()))
    assert "unknown   KV cache for 1 x unknown tokens" in text
    assert "the device's memory is not known" in text


def windowed(path: Path, **settings: object) -> tuple[Checkpoint, Capacity]:
    write_checkpoint(path, layers=4)
    checkpoint = read_checkpoint(path)
    checkpoint.config.update(settings)
    layers = plan_model(checkpoint, Target(cpu_device(), torch.bfloat16))
    demand = Demand(max_model_len=256, max_num_batched_tokens=16)
    return checkpoint, capacity_of(checkpoint, layers, torch.bfloat16, demand, 500_000)


def test_layers_of_several_kinds_are_told_apart(tmp_path: Path) -> None:
    _, found = windowed(tmp_path, model_type="gemma2", sliding_window=33)
    assert found.kv_layers == {"last 33 tokens": 2, "every token": 2}
    # 256 tokens in 16 blocks; 32 and twice 16 in flight in 4, and one where the window begins
    assert found.kv_bytes_per_sequence == (16 + 5) * 16 * found.kv_bytes_per_token
    text = render(capacity_table(found, Demand()))
    assert f"{found.kv_bytes_per_sequence} per sequence; layers by what they keep: " in text
    assert "2 last 33 tokens, 2 every token" in text


def test_what_no_rule_is_known_for_is_a_note_and_no_warning(tmp_path: Path) -> None:
    checkpoint, found = windowed(tmp_path, model_type="new", sliding_window=33)
    assert found.remains < 0
    layers = plan_model(checkpoint, Target(cpu_device(), torch.bfloat16))

    def too_small(capacity: Capacity) -> bool:
        warned = warnings_for(checkpoint, layers, torch.bfloat16, capacity)
        return any("the KV cache holds" in each.message for each in warned)

    assert not too_small(found)
    assert too_small(replace(found, unmodelled=()))
    (note,) = notes_for(checkpoint, found, cpu_device())
    assert note.message.endswith("not modelled, so no reason to refuse: sliding_window 33")


def test_weights_that_do_not_fit_are_refused_with_the_numbers(tmp_path: Path) -> None:
    checkpoint, found = plan(tmp_path, MODELS["Llama-3.3-70B"], 1, Demand(), "rtx4090")
    problem = memory_problem(checkpoint, found)
    assert problem is not None
    assert problem.found == "39.50 GB of weights on a rank"
    assert problem.supported.startswith("at most 23.70 GB")
    assert "--tensor-parallel-size" in problem.fix
    assert found.kv_tokens == 0
    checkpoint, found = plan(tmp_path, MODELS["Llama-3.3-70B"], 2, Demand(), "rtx4090")
    assert memory_problem(checkpoint, found) is None


def test_a_kv_cache_that_does_not_fit_is_warned_of(tmp_path: Path) -> None:
    demand = Demand(max_num_seqs=64)
    checkpoint, found = plan(tmp_path, LLAMA_8B, 1, demand, "rtx4090")
    layers = plan_model(checkpoint, Target(device_by_name("rtx4090"), torch.bfloat16))
    (warned,) = warnings_for(checkpoint, layers, torch.bfloat16, found)
    assert f"holds {found.kv_tokens} tokens, fewer than the 64 x 131072 asked" in warned.message
    assert "lower --max-model-len" in warned.message


def test_slow_kernels_rounded_scales_and_padding_are_warned_of(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gptq-sym-order", layers=2)
    checkpoint = read_checkpoint(tmp_path)

    def messages(kernel: str, tp: int) -> list[str]:
        target = Target(cpu_device(), torch.bfloat16, kernel)
        layers = plan_model(checkpoint, target, tp)
        found = capacity_of(checkpoint, layers, target.act_dtype, Demand(), None)
        warned = warnings_for(checkpoint, layers, target.act_dtype, found)
        return [f"{each.layer}: {each.message}" for each in warned]

    rounded = messages("cpu-wna16", 1)
    assert len(rounded) == 4
    assert all("float16 scales are rounded to bfloat16, as cpu-wna16" in text for text in rounded)
    assert rounded[0].startswith("model.layers.0-1.")
    slow = messages("cpu-striped", 2)
    assert sum("cpu-striped decodes a few output features at a time" in text for text in slow) == 4
    padded = [text for text in slow if "its activation order takes 1.33 times" in text]
    assert any("mlp.down_proj (2 layers)" in text for text in padded)


def test_padding_is_warned_of_with_the_setting_that_avoids_it(tmp_path: Path) -> None:
    """By hand for down_proj at TP 4: 3584 of 14336 in_features, in up to 112 groups. Each takes a
    step of 8 rows, each further 8 rows another: (112 + 434) * 8 = 4368 rows. In 35 K blocks of 128
    they take 35 * 128 * (4 + 16 / 8) / 3584 = 7.5 bits, and the order 32 * 4368 / (3584 * 4096)."""
    write_headers(tmp_path, LLAMA_8B, "gptq-order")
    checkpoint, target = read_checkpoint(tmp_path), Target(device_by_name("h200"), torch.bfloat16)
    layers = plan_model(checkpoint, target, 4, ranks=[0])
    found = capacity_of(checkpoint, layers, target.act_dtype, Demand(), None)
    warned = warnings_for(checkpoint, layers, target.act_dtype, found)
    (message,) = [each.message for each in warned if "mlp.down_proj" in each.layer]
    assert message == (
        "its activation order takes 1.22 times its share of the rows, 7.51 bits per weight with "
        "the scales, at tensor_parallel_size 4; quantize with desc_act false in GPTQModel's "
        "QuantizeConfig"
    )
