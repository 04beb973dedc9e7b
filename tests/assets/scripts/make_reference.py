"""Writes a checkpoint's reference: what its own producer's code says the weights are.

Codes, zero points and weights come from the producing library (compressed-tensors, AutoAWQ,
GPTQModel or bitsandbytes), so run this with that library installed. See README.md for the fields
written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

PROMPTS = 8
PROMPT_TOKENS = (48, 50, 52, 54, 56, 60, 62, 64)
GREEDY_TOKENS = 16


@dataclass
class QuantizedLinear:
    """One decoded layer: `weight` [N, K] fp32, `codes` [N, K], `zeros` and `scales` [N, G].

    `g_idx` [K] is the group of each input feature, None where groups are runs of them. With a
    `codebook` there are no zeros and a code is worth an entry of it.
    """

    weight: torch.Tensor
    codes: torch.Tensor
    zeros: torch.Tensor | None
    scales: torch.Tensor
    group_size: int
    bits: int = 4
    g_idx: torch.Tensor | None = None
    codebook: torch.Tensor | None = None

    def check(self) -> None:
        """Compare the library's weights with (code - zero) * scale from the parts hashed here."""
        groups = torch.arange(self.codes.shape[1]) // self.group_size
        groups = groups if self.g_idx is None else self.g_idx.long()
        if self.codebook is not None:
            values = self.codebook[self.codes.int()]
        else:
            values = self.codes.float() - self.zeros.float()[:, groups]
        expected = values * self.scales.float()[:, groups]
        if not torch.equal(expected, self.weight):
            raise ValueError("the library's weights differ from (code - zero) * scale")
        if self.codes.min() < 0 or self.codes.max() >= 2**self.bits:
            raise ValueError(f"a code does not fit {self.bits} bits")

    def describe(self) -> dict:
        n, k = self.codes.shape
        return {
            "N": n,
            "K": k,
            "group_size": self.group_size,
            "codes_sha256": digest(self.codes.to(torch.uint8)),
            "zeros_sha256": None if self.zeros is None else digest(self.zeros.to(torch.uint8)),
            "scales_sha256": digest(self.scales),
            "scales_dtype": str(self.scales.dtype).removeprefix("torch."),
        }


def digest(tensor: torch.Tensor) -> str:
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()


def decode_compressed_tensors(parts: dict, settings: dict, module: str) -> QuantizedLinear:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.utils.match import is_match

    embedding = module.endswith("embed_tokens")
    layer = torch.nn.Embedding(1, 1) if embedding else torch.nn.Linear(1, 1)
    schemes = [QuantizationScheme.model_validate(g) for g in settings["config_groups"].values()]
    scheme = next(s for s in schemes if is_match(module, layer, s.targets))
    scales, bits = parts["weight_scale"], scheme.weights.num_bits
    # With fp32 scales the library computes in fp32.
    state = dict(parts, weight_scale=scales.float())
    offset = 2 ** (bits - 1)  # the library's codes and zero points are signed
    if "weight_packed" in parts:
        shape = torch.Size(parts["weight_shape"].tolist())
        state["weight_shape"] = shape
        codes = unpack_from_int32(parts["weight_packed"], bits, shape)
    else:
        codes = parts["weight"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format or settings["format"])
    decoded = compressor.decompress(state, scheme)
    zeros = torch.full(scales.shape, offset, dtype=torch.int32)
    if not scheme.weights.symmetric:
        zeros = decoded["weight_zero_point"].to(torch.int32) + offset
    return QuantizedLinear(
        decoded["weight"].float(),
        codes.to(torch.int32) + offset,
        zeros,
        scales,
        scheme.weights.group_size or codes.shape[1],
        bits,
    )


def decode_awq(parts: dict, settings: dict, module: str) -> QuantizedLinear:
    from awq.utils.packing_utils import dequantize_gemm, reverse_awq_order, unpack_awq

    group_size, bits = settings["group_size"], settings["bits"]
    qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    weight = dequantize_gemm(qweight, qzeros, scales.float(), bits, group_size)
    codes, zeros = reverse_awq_order(*unpack_awq(qweight, qzeros, bits), bits)
    return QuantizedLinear(weight.t(), codes.t() & 15, zeros.t() & 15, scales.t(), group_size)


def decode_gptq(parts: dict, settings: dict, module: str) -> QuantizedLinear:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import dynamic_get
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    stored_minus_one = settings["checkpoint_format"] == "gptq"
    settings = {
        key: dynamic_get(settings.get("dynamic"), module, key, settings[key])
        for key in ("bits", "group_size", "sym", "desc_act")
    }
    scales = parts["scales"]
    in_features, out_features = parts["g_idx"].shape[0], scales.shape[1]
    group_size = in_features if settings["group_size"] == -1 else settings["group_size"]
    layer = TorchLinear(
        bits=settings["bits"],
        group_size=settings["group_size"],
        sym=settings["sym"],
        desc_act=settings["desc_act"],
        in_features=in_features,
        out_features=out_features,
    )
    layer.eval()
    layer.qweight, layer.qzeros = parts["qweight"].clone(), parts["qzeros"].clone()
    layer.g_idx, layer.scales = parts["g_idx"], scales.float()
    if stored_minus_one:
        # The library decodes zero points as they are (v2)
        convert_gptq_v1_to_v2_format_module(layer, settings["bits"], torch.int32)
    stored = layer.qweight, layer.qzeros
    weight = layer.dequantize_weight().clone()
    # Unit scales turn the library's own decoder into one for the codes or the zero points alone.
    layer.scales = torch.ones_like(layer.scales)
    layer.qzeros = torch.zeros_like(stored[1])
    layer.clear_weight_cache()
    codes = layer.dequantize_weight().clone()
    layer.qweight, layer.qzeros = torch.zeros_like(stored[0]), stored[1]
    layer.clear_weight_cache()
    # One input feature of each group
    firsts = parts["g_idx"].argsort(stable=True)[::group_size]
    zeros = -layer.dequantize_weight()[firsts].clone()
    return QuantizedLinear(
        weight.t(),
        codes.t().to(torch.int32),
        zeros.t().to(torch.int32),
        scales.t(),
        group_size,
        settings["bits"],
        parts["g_idx"],
    )


def decode_bitsandbytes(parts: dict, settings: dict, module: str) -> QuantizedLinear:
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    packed = parts["weight"]
    stored = {name: value for name, value in parts.items() if name != "weight"}
    state = QuantState.from_dict(stored, torch.device("cpu"))
    n, k = state.shape
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    state.dtype = torch.float32
    weight = dequantize_4bit(packed, state)
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(n, k)
    scales = absmax.view(n, k // state.blocksize)
    return QuantizedLinear(weight, codes, None, scales, state.blocksize, codebook=state.code)


DECODERS = {
    "compressed-tensors": (decode_compressed_tensors, "weight_scale"),
    "awq": (decode_awq, "qweight"),
    "gptq": (decode_gptq, "qweight"),
    "bitsandbytes": (decode_bitsandbytes, "weight.absmax"),
}


def decode_checkpoint(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """State dict in fp32, and the description of every quantized layer."""
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    settings = config.get("quantization_config")
    if settings is None:
        return {name: value.float() for name, value in tensors.items()}, {}
    decode, marker = DECODERS[settings["quant_method"]]
    layers = sorted(n.removesuffix("." + marker) for n in tensors if n.endswith("." + marker))
    state, described = {}, {}
    for layer in layers:
        prefix = layer + "."
        names = [name for name in tensors if name.startswith(prefix)]
        parts = {name.removeprefix(prefix): tensors.pop(name) for name in names}
        linear = decode(parts, settings, layer)
        linear.check()
        state[prefix + "weight"] = linear.weight.contiguous()
        described[layer] = linear.describe()
    state.update({name: value.float() for name, value in tensors.items()})
    return state, described


def build_model(directory: Path, state: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    config = LlamaConfig.from_pretrained(directory)
    config.__dict__.pop("quantization_config", None)
    config._attn_implementation = "eager"
    config.use_cache = True
    model = LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if name != "lm_head.weight"]:
        raise ValueError(f"missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


def choose_prompts(tokenizer) -> list[tuple[str, list[int]]]:
    """Runs of whole lines' text from held-out files, the same for every checkpoint."""
    files = common.load_texts(held_out=True)
    chosen = []
    for index, length in enumerate(PROMPT_TOKENS):
        _, text = files[index * len(files) // PROMPTS]
        lines = text.splitlines(keepends=True)
        passage = "".join(lines[len(lines) // 3 :])
        # Cutting at a token may split a character or change the merges; re-encode what is stored.
        ids = tokenizer.encode(passage)[:length]
        prompt = tokenizer.decode(ids, skip_special_tokens=True)
        chosen.append((prompt, tokenizer.encode(prompt)))
    return chosen


@torch.inference_mode()
def run_prompt(model: LlamaForCausalLM, ids: list[int]) -> dict:
    logprobs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    actual = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    sequence, greedy, greedy_logprobs, margins = list(ids), [], [], []
    for _ in range(GREEDY_TOKENS):
        last = model(input_ids=torch.tensor([sequence])).logits[0, -1].float().log_softmax(-1)
        best = last.topk(2)
        token = best.indices[0].item()
        greedy.append(token)
        greedy_logprobs.append(best.values[0].item())
        margins.append((best.values[0] - best.values[1]).item())
        sequence.append(token)
    return {
        "token_ids": ids,
        "prompt_logprobs": [None, *actual.tolist()],
        "greedy_token_ids": greedy,
        "greedy_logprobs": greedy_logprobs,
        "greedy_margins": margins,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    state, layers = decode_checkpoint(args.model)
    model = build_model(args.model, state)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    loss = common.mean_loss(model, common.holdout_windows(tokenizer))
    print(f"{args.model.name}: held-out {loss:.4f} nats/token")
    prompts = []
    for text, ids in choose_prompts(tokenizer):
        result = run_prompt(model, ids)
        prompts.append(
            {"text": text, **result, "greedy_text": tokenizer.decode(result["greedy_token_ids"])}
        )
    reference = {
        "checkpoint": args.model.name,
        "heldout_nats_per_token": round(loss, 4),
        "heldout_perplexity": round(common.perplexity(loss), 4),
        "prompts": prompts,
        "layers": layers,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    common.write_reference(args.out, reference)


if __name__ == "__main__":
    main()
