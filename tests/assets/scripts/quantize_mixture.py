"""Makes a small random Qwen3-MoE, quantizes it with llm-compressor and writes what it is worth.

The reference's log-probabilities are those of transformers in fp32, with the weights that
compressed-tensors itself unpacks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import common
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from make_reference import decode_compressed_tensors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY, GROUP_SIZE, SAMPLES, TOKENS = 128, 64, 64, 64
# At two ranks a rank's 96 features of an expert end inside a group.
CONFIG = Qwen3MoeConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    moe_intermediate_size=192,
    num_experts=4,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    tie_word_embeddings=False,
)
SPREAD = 0.12
PROMPTS = [[(7 * i + 11 * j + 3) % VOCABULARY for i in range(24)] for j in range(6)]


def random_model(path: Path) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, SPREAD)
    model.save_pretrained(path)


def quantize(source: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    rows = torch.randint(0, VOCABULARY, (SAMPLES, TOKENS))
    dataset = Dataset.from_dict(
        {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
    )
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=GROUP_SIZE)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    ignore = ["lm_head", "re:.*mlp.gate$"]
    recipe = GPTQModifier(ignore=ignore, config_groups={"group_0": scheme})
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        max_seq_length=TOKENS,
        num_calibration_samples=SAMPLES,
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(out, save_compressed=True)


@torch.no_grad()
def logprobs(quantized: Path) -> list[list[float]]:
    """Of every token but a prompt's first."""
    settings = json.loads((quantized / "config.json").read_text())["quantization_config"]
    tensors = load_file(quantized / "model.safetensors")
    model = Qwen3MoeForCausalLM(CONFIG).float().eval()
    state = model.state_dict()
    packed = {name.rpartition(".")[0] for name in tensors if name.endswith("weight_packed")}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        if module not in packed:
            state[name].copy_(tensor)
    for module in packed:
        parts = {
            name.rpartition(".")[2]: tensor
            for name, tensor in tensors.items()
            if name.rpartition(".")[0] == module
        }
        weight = decode_compressed_tensors(parts, settings, module).weight
        stack, _, expert = module.partition(".experts.")
        if not expert:
            state[f"{module}.weight"].copy_(weight)
            continue
        number, _, name = expert.partition(".")
        if name == "down_proj":
            state[f"{stack}.experts.down_proj"][int(number)].copy_(weight)
        else:
            half = state[f"{stack}.experts.gate_up_proj"][int(number)].chunk(2)
            half[name == "up_proj"].copy_(weight)
    found = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        scores = model(tokens).logits[0, :-1].log_softmax(-1)
        found.append(scores.gather(1, tokens[0, 1:, None])[:, 0].tolist())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", type=Path, required=True, help="where the plain model goes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random_model(args.plain)
    quantize(args.plain, args.out)
    for name in ("recipe.yaml", "generation_config.json"):
        (args.out / name).unlink(missing_ok=True)
    common.update_json(args.out / "config.json", {})
    reference = {"prompts": PROMPTS, "prompt_logprobs": logprobs(args.out)}
    args.reference.write_text(json.dumps(reference) + "\n")


if __name__ == "__main__":
    main()
