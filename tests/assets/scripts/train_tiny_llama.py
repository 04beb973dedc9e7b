"""Trains a Llama of about one million parameters on the standard library's source.

Every linear layer's K is a multiple of 128, and so is K/2 of the row-parallel ones, so that groups
of 128 fit both whole and when split over two ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import common
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

BOS, EOS = "<s>", "</s>"
VOCAB = 512
SEED = 1234
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '# ' + message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '# assistant: ' }}{% endif %}"
)


def train_tokenizer(texts: list[tuple[str, str]], out: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in texts), trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    # Written by hand: the class name transformers 5 would write is unknown to transformers 4,
    # which the older quantizers need.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    special = {"bos_token": BOS, "eos_token": EOS}
    (out / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def build_model(bos: int, eos: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    return LlamaForCausalLM(config)


def ngram_losses(train: torch.Tensor, rows: torch.Tensor) -> tuple[float, float]:
    """Held-out losses of a smoothed unigram and of a bigram interpolated with it."""
    unigram = torch.bincount(train, minlength=VOCAB).double() + 1
    unigram /= unigram.sum()
    pairs = torch.bincount(train[:-1] * VOCAB + train[1:], minlength=VOCAB * VOCAB)
    pairs = pairs.view(VOCAB, VOCAB).double()
    prior = 20.0
    bigram = (pairs + prior * unigram) / (pairs.sum(1, keepdim=True) + prior)
    previous, actual = rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1)
    # The start token never occurs inside the stream, so the row it selects is the unigram.
    return (
        -unigram[actual].log().mean().item(),
        -bigram[previous, actual].log().mean().item(),
    )


def train(
    model: LlamaForCausalLM, stream: torch.Tensor, bos: int, steps: int, batch: int, peak: float
) -> None:
    generator = torch.Generator().manual_seed(SEED)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
        fused=True,
    )
    warmup = 50

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    body = common.WINDOW - 1
    offsets = torch.arange(body)
    first = torch.full((batch, 1), bos)
    began = time.monotonic()
    for step in range(steps):
        starts = torch.randint(0, len(stream) - body, (batch, 1), generator=generator)
        rows = torch.cat([first, stream[starts + offsets]], dim=1)
        logits = model(input_ids=rows).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), rows[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.monotonic() - began:.0f}s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--metrics", type=Path, help="JSON file to merge the losses into")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    args.out.mkdir(parents=True, exist_ok=True)
    held_in = common.load_texts(held_out=False)
    train_tokenizer(held_in, args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    stream = common.token_stream(tokenizer, held_in)
    rows = common.holdout_windows(tokenizer)

    model = build_model(tokenizer.bos_token_id, tokenizer.eos_token_id)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"parameters {parameters}, training tokens {len(stream)}", flush=True)
    unigram, bigram = ngram_losses(stream, rows)
    print(f"held-out nats/token: unigram {unigram:.4f}, bigram {bigram:.4f}", flush=True)
    model.train()
    train(model, stream, tokenizer.bos_token_id, args.steps, args.batch, args.lr)
    model.eval()
    trained = common.mean_loss(model, rows)

    model.to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.save_pretrained(args.out)
    common.clean_configs(args.out)
    stored = common.mean_loss(model.float(), rows)
    print(f"held-out nats/token: trained {trained:.4f}, rounded to bfloat16 {stored:.4f}")
    metrics = {
        "heldout_nats_per_token": {
            "unigram": round(unigram, 4),
            "bigram": round(bigram, 4),
            "model_fp32": round(trained, 4),
            "model_bf16": round(stored, 4),
        },
        "heldout_tokens": rows[:, 1:].numel(),
        "train_tokens_in_corpus": len(stream),
        "train_tokens_seen": args.steps * args.batch * common.WINDOW,
        "parameters": parameters,
        "corpus_sha256_held_in": common.corpus_sha256(held_in),
        "corpus_sha256_held_out": common.corpus_sha256(common.load_texts(held_out=True)),
    }
    if args.metrics:
        common.update_json(args.metrics, metrics)


if __name__ == "__main__":
    main()
