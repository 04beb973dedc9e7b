"""Compares the plugin's hooks with the sources of any vLLM, which need not run here.

    python scripts/check_vllm_hooks.py                        # the vLLM that is installed
    python scripts/check_vllm_hooks.py FOLDER [FOLDER ...]    # folders that hold `vllm/`

A wheel that fits no machine at hand unpacks with `unzip WHEEL 'vllm/*.py' -d FOLDER`. Nothing is
imported: both sides are read with `ast`. It proves that names and signatures fit, which is what an
update of vLLM breaks first; that a model answers is for the engine tests.

What is compared: every name that `integration/` imports from vLLM; every method that its classes
override, whose parameters the override must take; every abstract method of those bases; the
attributes and calls that a type would not show (`RELIED_UPON`); and that vLLM renames checkpoint
tensors by no other mapper than those that the plugin overrides, since one of them drops `.g_idx`.
"""

import ast
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

INTEGRATION = Path(__file__).resolve().parent.parent / "vllm_fusedq" / "integration"
LOADER = "vllm.model_executor.models.utils"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_BASE = f"{_QUANTIZATION}.base_config"
_ATTENTION = "vllm.model_executor.layers.attention.attention"
_LINEAR = "vllm.model_executor.layers.linear"
_VOCABULARY = "vllm.model_executor.layers.vocab_parallel_embedding"
_EXPERTS = "vllm.model_executor.layers.fused_moe"
_PLUGINS = "vllm.plugins"


class Relied(NamedTuple):
    """Text that the source of a definition must hold: a name that no import or signature shows."""

    module: str
    definition: str
    texts: tuple[str, ...]


RELIED_UPON = (
    # Hooks that nothing would call any more under another name.
    Relied(
        _BASE,
        "QuantizationConfig",
        (
            *("def override_quantization_method", "def maybe_update_config"),
            *("def apply_vllm_mapper", "def get_cache_scale_mapper"),
        ),
    ),
    Relied(LOADER, "WeightsMapper", ("def apply(", "def __or__(", "@dataclass")),
    Relied(_BASE, "QuantizeMethodBase", ("def process_weights_after_loading",)),
    Relied(
        f"{_QUANTIZATION}.kv_cache",
        "BaseKVCacheMethod",
        (*("layer.k_scale = ", "layer.v_scale = "), *("del layer.k_scale", "layer._k_scale.copy_")),
    ),
    Relied(f"{_QUANTIZATION}.kv_cache", "KVCacheScaleParameter", ("torch.tensor(-1.0)",)),
    Relied(_ATTENTION, "Attention", ("kv_cache_scheme", "kv_cache_dtype")),
    Relied(_LINEAR, "LinearMethodBase", ("def create_weights", "def apply")),
    Relied(_LINEAR, "LinearBase", ("tp_size", "tp_rank", "quant_method")),
    Relied(
        _LINEAR,
        "QKVParallelLinear",
        ("num_kv_head_replicas", "total_num_heads", "total_num_kv_heads", "head_size"),
    ),
    Relied(
        _VOCABULARY,
        "VocabParallelEmbedding",
        (
            *("shard_indices", "num_embeddings", "embedding_dim"),
            *("quant_method.create_weights", "quant_method.embedding"),
        ),
    ),
    Relied(_VOCABULARY, "ParallelLMHead", ("quant_method.tie_weights",)),
    Relied(
        _VOCABULARY,
        "VocabParallelEmbeddingShardIndices",
        ("org_vocab_start_index", "org_vocab_end_index"),
    ),
    Relied(
        f"{_EXPERTS}.config", "FusedMoEConfig", ("num_logical_experts", "hidden_dim", "has_bias")
    ),
    Relied(
        f"{_EXPERTS}.routed_experts",
        "RoutedExperts",
        (
            *("self.quant_method.create_weights", "self.quant_method.apply(", "expert_map_manager"),
            *("_expert_map", "return_success=True", "apply_router_weight_on_input", "swiglu_limit"),
        ),
    ),
    Relied(
        "vllm.config.parallel",
        "ParallelConfig",
        ("enable_expert_parallel", "enable_eplb", "all2all_backend", "use_sequence_parallel_moe"),
    ),
    Relied(_PLUGINS, "load_endpoint_plugins", ("ENDPOINT_PLUGINS_GROUP",)),
    Relied("vllm.config.vllm", "VllmConfig", ("additional_config", "quant_config")),
    Relied("vllm.v1.worker.worker_base", "WorkerBase", ("vllm_config",)),
    Relied("vllm.plugins.endpoint_plugins.interface", "EndpointPlugin", ("attach_router", "state")),
)


class Sources:
    """The modules of one unpacked vLLM, parsed on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trees: dict[str, ast.Module | None] = {}

    def module(self, name: str) -> ast.Module | None:
        if name not in self._trees:
            stem = self.folder.joinpath(*name.split("."))
            files = (stem.with_suffix(".py"), stem / "__init__.py")
            file = next((each for each in files if each.exists()), None)
            self._trees[name] = None if file is None else ast.parse(file.read_text())
        return self._trees[name]

    def defines(self, module: str, name: str) -> bool:
        """Whether `from module import name` finds something, also where it is loaded lazily."""
        tree = self.module(module)
        if tree is None:
            return False
        if self.module(f"{module}.{name}") is not None or name in _bound_names(tree):
            return True
        imports = self.imports(module)
        if any(alias.name == "*" and self.defines(source, name) for source, alias in imports):
            return True
        if "__getattr__" not in _bound_names(tree):
            return False
        # Such a module finds its names in a table of strings, or in annotations.
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        return name in strings

    def imports(self, module: str) -> list[tuple[str, ast.alias]]:
        """(absolute module, name) of each `from ... import name` of a module, at any depth."""
        tree = self.module(module)
        is_package = self.folder.joinpath(*module.split("."), "__init__.py").exists()
        parts = module.split(".")
        found = []
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.ImportFrom):
                up = node.level - is_package
                base = parts[: len(parts) - up] if node.level else []
                source = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
                found += [(source, alias) for alias in node.names]
        return found

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """The class or function of that name and the module that holds it, through re-exports."""
        tree = self.module(module)
        if tree is None:
            return None
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return module, node
        for source, alias in self.imports(module):
            if alias.name == name or (alias.name == "*" and self.defines(source, name)):
                return self.find(source, name)
        return None


def problems(folder: Path, integration: Path = INTEGRATION) -> list[str]:
    """Everything in which the vLLM below `folder` does not fit the plugin, one sentence each."""
    vllm = Sources(folder)
    if vllm.module("vllm") is None:
        return [f"{folder} holds no vllm/__init__.py"]
    found: list[str] = []
    for file in sorted(integration.glob("*.py")):
        tree = ast.parse(file.read_text())
        imported = {alias.name: module for module, alias in _imports(tree) if _is_vllm(module)}
        for name, module in imported.items():
            if not vllm.defines(module, name):
                found.append(f"{file.name}: {module} has no {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found += _class_problems(file.name, node, imported, vllm)
    found += _relied_problems(vllm)
    found += _mapper_problems(vllm, integration)
    return found


def _class_problems(
    file: str, ours: ast.ClassDef, imported: dict[str, str], vllm: Sources
) -> Iterator[str]:
    """Overrides that do not take what their base's callers pass, and abstract methods left out."""
    methods = _methods(ours)
    for base_name in (b.id for b in ours.bases if isinstance(b, ast.Name) and b.id in imported):
        inherited: dict[str, ast.FunctionDef] = {}
        for base in _lineage(vllm, imported[base_name], base_name):
            inherited = _methods(base) | inherited
        for name, theirs in inherited.items():
            where = f"{file}: {ours.name}.{name}"
            if name in methods and not name.startswith("__"):
                for missing in _untaken(methods[name], theirs):
                    yield f"{where} does not take {missing!r}, which {base_name} declares"
            elif "abstractmethod" in _decorators(theirs) and name not in methods:
                yield f"{where} is missing, {base_name} declares it abstract"


def _lineage(vllm: Sources, module: str, name: str) -> Iterator[ast.ClassDef]:
    """A class of vLLM and its bases, as far as they are vLLM's."""
    found = vllm.find(module, name)
    if found is None or not isinstance(found[1], ast.ClassDef):
        return
    yield found[1]
    for base in found[1].bases:
        if isinstance(base, ast.Name):
            yield from _lineage(vllm, found[0], base.id)


def _relied_problems(vllm: Sources) -> Iterator[str]:
    for relied in RELIED_UPON:
        found = vllm.find(relied.module, relied.definition)
        if found is None:
            yield f"{relied.module} has no {relied.definition}"
            continue
        lineage = [found[1], *_lineage(vllm, relied.module, relied.definition)]
        text = "\n".join(ast.unparse(node) for node in lineage)
        for each in relied.texts:
            if each not in text:
                yield f"{relied.module}.{relied.definition} has no {each}"


def _mapper_problems(vllm: Sources, integration: Path) -> Iterator[str]:
    """Mappers that vLLM's loader asks of a quantization config and that the plugin leaves alone."""
    own = set()
    for file in integration.glob("*.py"):
        tree = ast.parse(file.read_text())
        own |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    loader = vllm.module(LOADER)
    asked = {
        node.attr
        for node in (ast.walk(loader) if loader else ())
        if isinstance(node, ast.Attribute)
        and node.attr.endswith("_mapper")
        and "quant_config" in ast.unparse(node.value)
    }
    if not asked:
        yield f"{LOADER} asks the quantization config for no mapper: where does it rename tensors?"
    for name in sorted(asked - own):
        yield f"{LOADER} renames tensors by {name}, which the plugin does not override"


def _imports(tree: ast.AST) -> Iterator[tuple[str, ast.alias]]:
    """(module, name) of each `from module import name`, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node.module, alias


def _bound_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def _methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}


def _decorators(node: ast.FunctionDef) -> set[str]:
    return {ast.unparse(decorator) for decorator in node.decorator_list}


def _untaken(ours: ast.FunctionDef, theirs: ast.FunctionDef) -> list[str]:
    """Parameters of `theirs` that a call by name, or by place, could not pass to `ours`."""
    mine, base = _parameters(ours), _parameters(theirs)
    if ours.args.kwarg is None:
        return [name for name in base if name not in mine]
    # By name everything arrives; by place only what stands where the base has it.
    shared = base[: len(mine)]
    return [name for name, own in zip(shared, mine, strict=False) if name != own and name in mine]


def _parameters(node: ast.FunctionDef) -> list[str]:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def _is_vllm(module: str) -> bool:
    return module.split(".")[0] == "vllm"


def installed() -> Path:
    """The folder that holds the installed vLLM."""
    found = find_spec("vllm")
    if found is None or found.origin is None:
        sys.exit("no vLLM is installed: name a folder that holds vllm/")
    return Path(found.origin).parent.parent


def main(folders: list[str]) -> int:
    failed = False
    for folder in map(Path, folders or [installed()]):
        found = problems(folder)
        failed |= bool(found)
        print(f"{folder}: {'does not fit' if found else 'fits'}")
        for problem in found:
            print(f"  {problem}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
