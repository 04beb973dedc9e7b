"""vLLM's layers and the quantized embedding: who gets which method, and what is refused late."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from embeddings import EMBEDDING, VOCABULARY, write_with_embedding
from fusedq_kernels.choose.device import cpu_device
from vllm_configs import current_config
from vllm_fusedq.checkpoint.read import read_checkpoint
from vllm_fusedq.errors import PreflightError
from vllm_fusedq.formats import format_for
from vllm_fusedq.plan.layer import Target
from vllm_fusedq.settings import Settings
from vllm_fusedq.worker.state import WorkerRank

HIDDEN = 128
IDS = torch.tensor([[3, 0, 31], [7, 7, 1]])


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from vllm.distributed import parallel_state

    group = SimpleNamespace(rank_in_group=0, world_size=1)
    monkeypatch.setattr(parallel_state, "_TP", group)
    with current_config():
        yield


def config_for(path: Path, **known: Any) -> Any:
    from vllm_fusedq.integration.config import FusedQConfig
    from vllm_fusedq.worker.state import WorkerState

    config = FusedQConfig()
    config.format = format_for(read_checkpoint(path))
    target = Target(cpu_device(), torch.float16, "cpu-striped")
    config.worker = WorkerState(target, Settings(), **known)
    return config


def embedding_of(config: Any, prefix: str) -> Any:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return VocabParallelEmbedding(
        VOCABULARY, HIDDEN, quant_config=config, prefix=prefix, params_dtype=torch.float16
    )


def head_of(config: Any) -> Any:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return ParallelLMHead(
        VOCABULARY, HIDDEN, quant_config=config, prefix="lm_head", params_dtype=torch.float16
    )


def fill(layer: Any, path: Path) -> None:
    for name, tensor in load_file(path / "model.safetensors").items():
        module, _, suffix = name.rpartition(".")
        if module == EMBEDDING:
            parameter = getattr(layer, suffix)
            parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("prefix", [EMBEDDING, ""], ids=["named", "nameless"])
def test_vllm_looks_rows_up(tmp_path: Path, one_rank: None, prefix: str) -> None:
    truth = write_with_embedding(tmp_path, "ct-asym", tied=False, hidden=HIDDEN)[EMBEDDING]
    config = config_for(tmp_path)
    layer = embedding_of(config, prefix)
    assert config.worker.plans[0].prefix == EMBEDDING
    fill(layer, tmp_path)
    expected = truth.values(0, VOCABULARY, 0, HIDDEN)[IDS].half()
    assert torch.equal(layer(IDS), expected)


def test_a_tied_head_multiplies_by_the_embedding_s_weight(tmp_path: Path, one_rank: None) -> None:
    truth = write_with_embedding(tmp_path, "ct-asym", tied=True, hidden=HIDDEN)[EMBEDDING]
    config = config_for(tmp_path)
    layer, head = embedding_of(config, ""), head_of(config)
    head = head.tie_weights(layer)
    fill(layer, tmp_path)
    head.quant_method.process_weights_after_loading(head)
    # One weight, one plan
    assert len(config.worker.plans) == 1
    assert not list(head.parameters())
    assert sum(buffer.numel() for buffer in head.buffers()) == 0
    x = torch.eye(HIDDEN, dtype=torch.float16)
    logits = head.quant_method.apply(head, x)
    assert torch.equal(logits[:, :VOCABULARY].T, truth.values(0, VOCABULARY, 0, HIDDEN).half())


def test_an_unquantized_embedding_keeps_vllm_s_method(tmp_path: Path, one_rank: None) -> None:
    from checkpoints import write_checkpoint

    write_checkpoint(tmp_path, "ct-sym", hidden=HIDDEN)
    config = config_for(tmp_path)
    for layer in (embedding_of(config, EMBEDDING), embedding_of(config, ""), head_of(config)):
        assert type(layer.quant_method).__name__ == "UnquantizedEmbeddingMethod"
    config.get_cache_scale_mapper()


def test_a_head_that_vllm_does_not_tie_is_refused(tmp_path: Path, one_rank: None) -> None:
    write_with_embedding(tmp_path, tied=True, hidden=HIDDEN)
    head = head_of(config_for(tmp_path))
    message = (
        "lm_head: found an lm_head that the checkpoint ties to the quantized model.embed_tokens "
        "and vLLM's model does not; supported: tied embeddings where vLLM's model ties them"
    )
    with pytest.raises(PreflightError, match=message):
        head.quant_method.process_weights_after_loading(head)


@pytest.mark.parametrize(
    ("tied", "stage", "refused"),
    [(False, 0, True), (False, 1, False), (True, 1, True)],
)
def test_a_model_that_builds_its_embedding_unquantized_is_refused(
    tmp_path: Path, one_rank: None, tied: bool, stage: int, refused: bool
) -> None:
    """Before a weight is loaded, on the stages that hold the embedding."""
    write_with_embedding(tmp_path, tied=tied, hidden=HIDDEN)
    config = config_for(tmp_path, rank=WorkerRank(pipeline=stage, pipeline_size=2))
    if not refused:
        config.get_cache_scale_mapper()
        return
    message = (
        "model.embed_tokens: found a quantized embedding in a model that vLLM builds with an "
        "unquantized one; supported: models whose embedding vLLM builds with its quantization"
    )
    with pytest.raises(PreflightError, match=message):
        config.get_cache_scale_mapper()


def test_an_embedding_of_another_size_is_refused(tmp_path: Path, one_rank: None) -> None:
    write_with_embedding(tmp_path, tied=False, hidden=HIDDEN // 2)
    with pytest.raises(PreflightError, match=r"embed_tokens: found \[32, 64\].*\[32, 128\], which"):
        embedding_of(config_for(tmp_path), "")
