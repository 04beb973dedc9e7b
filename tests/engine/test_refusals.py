"""Bad checkpoints never serve: refused in the API process from the headers alone where possible,
else by the worker before it serves, with our message last."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig

import local_server
import preloaded
from checkpoints import (
    add,
    drop,
    put,
    rename,
    replace,
    write_checkpoint,
    write_json,
)
from kv_scales import SCHEME, kv_scales
from local_server import ServerDied, environment, serving
from preloaded import run_script
from random_models import write_random_model

pytestmark = pytest.mark.engine

BLOCK = "model.layers.0"
DOWN = f"{BLOCK}.mlp.down_proj"
Maker = Callable[[Path], object]


def edited(build: str, *edits: object, **config: object) -> Maker:
    return lambda path: write_checkpoint(path, build, edits=edits, config=config)


def pickled(path: Path) -> None:
    write_checkpoint(path, "awq")
    (path / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, path / "pytorch_model.bin")


def truncated(path: Path) -> None:
    write_checkpoint(path, "awq")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])


def absurd_header(path: Path) -> None:
    write_checkpoint(path, "awq")
    file = path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])


def missing_shard(path: Path) -> None:
    write_checkpoint(path, "awq")
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    write_json(path / "model.safetensors.index.json", index)


def not_quantized(path: Path) -> None:
    write_checkpoint(path, "awq")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    write_json(path / "config.json", config)


def plain_weight(path: Path) -> None:
    edits = [drop(f"{DOWN}.{name}") for name in ("qweight", "qzeros", "scales")]
    edits.append(add(f"{DOWN}.weight", torch.zeros(64, 96)))
    write_checkpoint(path, "awq", edits=edits)


def odd_group(path: Path) -> None:
    write_checkpoint(path, "awq", hidden=96, intermediate=96, group_size=12)


def bloom(path: Path) -> None:
    config = BloomConfig(vocab_size=64, hidden_size=64, n_layer=1, n_head=4)
    write_random_model(path, config, "gptq-sym")


# Name -> (how to make it, what the message must say). All are refused before a worker starts.
IN_API_PROCESS: dict[str, tuple[Maker, str]] = {
    "torchao": (edited("awq", quant_method="torchao"), "quant_method 'torchao'"),
    "gguf": (edited("awq", quant_method="gguf"), "supported: awq, gptq, compressed-tensors"),
    "9 bits": (edited("gptq-sym", bits=9), "bits 9"),
    "8-bit awq": (edited("awq", bits=8), "bits"),
    "odd group": (odd_group, "group_size"),
    "act-order": (edited("gptq-sym-v2", desc_act=True), "no tensor g_idx"),
    "marlin": (edited("awq", version="marlin"), "version 'marlin'; supported by awq: version gemm"),
    "gemv in name only": (edited("awq", version="gemv"), "scales of shape [3, 64]"),
    "9 bits by rule": (
        edited("gptq-sym", dynamic={"+:.*up.*": {"bits": 9}}),
        "bits 9 in the dynamic rule '+:.*up.*'",
    ),
    "kv cache": (
        edited("ct-sym", kv_scales((1.0, 1.0)), kv_cache_scheme=SCHEME | {"strategy": "attn_head"}),
        "found kv_cache_scheme with strategy 'attn_head'; supported by compressed-tensors",
    ),
    "query scale": (
        edited("awq", kv_scales((1.0, 1.0)), add(f"{BLOCK}.self_attn.q_scale", torch.ones(1))),
        f"{BLOCK}.self_attn: found q_scale (quantized queries or attention)",
    ),
    "g_idx": (edited("ct-sym", add(f"{DOWN}.weight_g_idx", torch.zeros(96).int())), "weight_g_idx"),
    "experts": (
        edited("awq", rename(DOWN, f"{BLOCK}.mlp.experts.0.down_proj")),
        "experts without w1 and w3",
    ),
    "lm_head": (edited("awq", rename(DOWN, "lm_head")), "lm_head"),
    "lm_head against the config": (
        edited("ct-sym", rename(DOWN, "lm_head")),
        "lm_head: found packed tensors (weight_packed, weight_scale, weight_shape) although",
    ),
    "plain lm_head": (
        edited("ct-sym", ignore=[]),
        "lm_head: found an unquantized weight F16 [32, 64] although the config says",
    ),
    "embedding": (edited("awq", rename(DOWN, "model.embed_tokens")), "embed"),
    "no scales": (edited("awq", drop(f"{DOWN}.scales")), f"{DOWN}: found no tensor scales"),
    "no zeros": (edited("awq", drop(f"{DOWN}.qzeros")), f"{DOWN}: found no tensor qzeros"),
    "shape": (
        edited("awq", replace(f"{DOWN}.scales", lambda t: t[:-1])),
        "scales of shape [2, 64]",
    ),
    "dtype": (
        edited("awq", replace(f"{DOWN}.scales", torch.Tensor.double)),
        "scales stored as F64",
    ),
    "schemes": (
        edited("gptq-sym", replace(f"{BLOCK}.mlp.up_proj.scales", torch.Tensor.bfloat16)),
        "parts with different schemes",
    ),
    "excluded": (
        edited("awq", modules_to_not_convert=["down_proj"]),
        "leaves this module unquantized",
    ),
    "plain weight": (plain_weight, "although the config says that this module is quantized"),
    "8-bit bitsandbytes": (
        edited("bnb-nf4", load_in_4bit=False, load_in_8bit=True),
        "load_in_8bit (LLM.int8() multiplies by quantized activations); supported by bitsandbytes",
    ),
    "bitsandbytes state": (
        edited("bnb-nf4", drop(f"{DOWN}.weight.quant_state.bitsandbytes__nf4")),
        f"{DOWN}: found no readable weight.quant_state.bitsandbytes__nf4",
    ),
    "model code that rearranges": (
        bloom,
        "transformer.h.0.self_attention.query_key_value: found a quantized layer whose tensors "
        "vLLM's code for BloomForCausalLM rearranges while loading",
    ),
    "pickled": (pickled, "pickled weights"),
    "truncated": (truncated, "model.safetensors"),
    "absurd header": (absurd_header, "model.safetensors"),
    "missing shard": (missing_shard, "names 1 missing file"),
    "not quantized": (not_quantized, "this checkpoint is not quantized"),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory, scripts: Path) -> dict[str, dict]:
    """What `vllm.LLM` raised for each bad checkpoint; one process tries them all."""
    folder = tmp_path_factory.mktemp("bad")
    request = {}
    for index, (name, (make, _)) in enumerate(IN_API_PROCESS.items()):
        make(folder / str(index))
        request[name] = str(folder / str(index))
    write_json(folder / "request.json", request)
    files = [str(folder / "request.json"), str(folder / "answer.json")]
    log = folder / "log"
    assert run_script(scripts / "refuse.py", files, environment(), log) == 0, log.read_text()
    return json.loads((folder / "answer.json").read_text())


@pytest.mark.parametrize("name", IN_API_PROCESS)
def test_refused_before_any_worker_starts(refusals: dict[str, dict], name: str) -> None:
    refusal = refusals[name]
    assert refusal is not None, "it was served"
    assert refusal["type"] in ("CheckpointError", "UnsupportedCheckpoint", "PreflightError"), (
        refusal
    )
    assert IN_API_PROCESS[name][1] in refusal["message"], refusal
    assert refusal["children"] == 0


def config_of_another_model(path: Path) -> None:
    write_checkpoint(path, "awq")
    config = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**config, "intermediate_size": 128})


def other_format_beside(path: Path) -> None:
    """vLLM would load consolidated.safetensors alone, although the index names the other file."""
    write_checkpoint(path, "awq")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors, path / "consolidated.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    write_json(path / "model.safetensors.index.json", index)


# Name -> (how to make it, arguments of `vllm serve`, what the last words must say).
BY_WORKER: dict[str, tuple[Maker, list[str], str]] = {
    "NaN scale": (
        edited("awq", put(f"{DOWN}.scales", (1, 3), float("nan"))),
        [],
        f"{DOWN}.scales: found 1 NaN or infinite values",
    ),
    "g_idx out of range": (
        edited("gptq-sym-order", put(f"{DOWN}.g_idx", (5,), 77)),
        [],
        f"{DOWN}.g_idx: found group 77, expected 0 to 2",
    ),
    "zeros that disagree with sym": (
        edited("gptq-sym", put(f"{DOWN}.qzeros", (0, 0), 0)),
        [],
        f"{DOWN}",
    ),
    "split that no kernel covers": (
        lambda path: write_checkpoint(path, "awq", hidden=64, intermediate=48, group_size=16),
        ["--tensor-parallel-size", "2"],
        "tensor-parallel sizes that work for the whole model: 1",
    ),
    "config of another model": (
        config_of_another_model,
        [],
        "[96, 64] (out_features x in_features) in the checkpoint; supported: [128, 64]",
    ),
    "files of another format": (
        other_format_beside,
        [],
        "found consolidated.safetensors beside the model, which vLLM loads in its place",
    ),
    "KV scale of zero": (
        edited("awq", kv_scales((1.0, 0.0))),
        ["--kv-cache-dtype", "fp8"],
        f"{BLOCK}.self_attn.v_scale: found the scale 0, expected a positive number",
    ),
    "KV cache that scales are not for": (
        edited("awq", kv_scales((1.0, 1.0))),
        ["--kv-cache-dtype", "fp8_e5m2"],
        "found --kv-cache-dtype fp8_e5m2 beside scales that were made for fp8_e4m3",
    ),
    "unknown setting": (
        edited("awq"),
        ["--additional-config", '{"fusedq": {"kernels": "auto"}}'],
        "unknown key 'kernels'; supported: kernel",
    ),
}


def everything_printed(path: Path, arguments: list[str], start: Any = preloaded.start) -> str:
    """What a `vllm serve` that cannot start prints; that it starts is a failure."""
    common = ["--quantization", "fusedq", "--max-model-len", "64", "--enforce-eager"]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "--tensor-parallel-size" in arguments else {}
    arguments = [*common, "--skip-tokenizer-init", *arguments]
    log = path / "server.log"
    with (
        pytest.raises(ServerDied) as error,
        serving(path, log, arguments, start=start, **env),
    ):
        pass
    return str(error.value)


@pytest.mark.parametrize("name", BY_WORKER)
def test_refused_by_the_worker_with_our_message_last(tmp_path: Path, name: str) -> None:
    make, arguments, message = BY_WORKER[name]
    make(tmp_path)
    # One in processes that import vLLM themselves
    start = local_server.start if name == "NaN scale" else preloaded.start
    printed = everything_printed(tmp_path, arguments, start)
    ending = printed[printed.rindex("vllm-fusedq refused to serve this checkpoint.") :]
    assert message in ending
    assert "Traceback" not in ending
    assert len(ending.splitlines()) <= 6


def test_refusal_in_the_api_process_is_the_last_thing_printed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, edits=[drop(f"{DOWN}.scales")])
    printed = everything_printed(tmp_path, [], local_server.start).rstrip()
    assert re.search(rf"{re.escape(DOWN)}: found no tensor scales[^\n]*$", printed), printed[-2000:]
    assert "EngineCore" not in printed
