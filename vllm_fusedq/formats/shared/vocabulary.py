"""Input embeddings and lm_heads by the names that models give them, and whether the two are one."""

from vllm_fusedq.checkpoint.read import Checkpoint, config_sections

LM_HEADS = frozenset({"lm_head"})
INPUT_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings"})

_OTHERS = frozenset({"wpe"})
_ENDINGS = ("embed", "embedding", "embeddings")


def is_lm_head(module: str) -> bool:
    return _last_name(module) in LM_HEADS


def is_input_embedding(module: str) -> bool:
    """Whether token ids are looked up here; positions and images have embeddings of their own."""
    return _last_name(module) in INPUT_EMBEDDINGS


def is_head(module: str) -> bool:
    """An lm_head or an embedding of any kind: no linear layer between the two."""
    last = _last_name(module)
    if last in LM_HEADS | INPUT_EMBEDDINGS | _OTHERS:
        return True
    return last.endswith(_ENDINGS) or last.startswith("embed_")


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the lm_head is the input embedding: one weight, looked up and multiplied by.

    A config.json may leave out what is the default of its model; then the tensors tell.
    """
    sections = config_sections(checkpoint.config)
    found = [section.get("tie_word_embeddings") for section in sections]
    if any(found):
        return True
    return False not in found and not any(map(is_lm_head, checkpoint.modules()))


def _last_name(module: str) -> str:
    return module.rpartition(".")[2]
