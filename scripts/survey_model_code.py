"""Finds vLLM's model code that touches tensors between the file and their layers.

    python scripts/survey_model_code.py                        # the vLLM that is installed
    python scripts/survey_model_code.py FOLDER [FOLDER ...]    # folders that hold `vllm/`

Nothing is imported: the sources are read with `ast`. Loading code is `load_weights`, every weight
loader, what handles a `loaded_weight` or is a generator over `weights`, and the functions of the
same file that these call. It counts where it views, cuts, joins or permutes a tensor. `READ` says
what each file was found to do; one that is missing there fails the command and has to be read: if
it rearranges a dense linear layer, the layer belongs into `vllm_fusedq/plan/model_code.py`.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

FOLDERS = ("model_executor/models", "models")
TOUCHES = frozenset(
    (
        *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "swapaxes"),
        *("chunk", "split", "narrow", "unbind", "index_select", "gather", "movedim"),
        *("cat", "concat", "concatenate", "stack", "hstack", "vstack"),
        *("repeat", "repeat_interleave", "expand", "flip", "roll"),
    )
)
LAYOUT = frozenset({"output_dim", "input_dim", "packed_dim", "packed_factor"})
LOADING = re.compile(r"load_weights?$|weight_loader|load.*weights?")
# Cutting names, not tensors
NAME_SPLIT = re.compile(r"\.split\((['\"].*['\"]|[^()]*\.[a-z_]*name)")

# What the files were found to do, as regular expressions of their paths.
NAMED = "a dense layer: in plan/model_code.py"
COMPARED = "a dense layer, by cutting it: the comparison while loading refuses it"
OWN_CLASS = "a layer class with a loader of its own, which is refused"
EXPERTS = "experts; a tensor that is cut or moved is refused while loading"
DRAFTS = "weights of draft models, once they are loaded"
NO_LINEAR = "norms, biases, sinks, embeddings, convolutions or scales of other formats"
UNPACKED = "an unquantized `weight` of GPT-2's Conv1D, which is stored transposed"
_VLLM = "model_executor/models"
READ = {
    rf"{_VLLM}/(bloom|falcon|fairseq2_llama|gpt_neox|hunyuan_v1|k2_horizon|llama4|mistral"
    r"|plamo2|telechat2|bert_with_rope)\.py": NAMED,
    r"models/muse_spark/(amd|nvidia)/model\.py": NAMED,
    rf"{_VLLM}/gpt2\.py": UNPACKED,
    rf"{_VLLM}/(mllama4|ernie45_vl_moe|hy_v3_mtp|step3_text|step3p5|moondream3)\.py": COMPARED,
    r"models/inkling/(amd|nvidia)/model\.py": COMPARED,
    r"models/dots3_note/nvidia/(model|mtp)\.py": COMPARED,
    r"models/(glm5next/(common|nvidia)|kimi_k3/nvidia)/(kda|model)\.py": OWN_CLASS,
    r"models/(muse_spark/common/layers|step5/nvidia/model|qwen4_exp/common/ple)\.py": OWN_CLASS,
    rf"{_VLLM}/(AXK1|arctic|dbrx|deepseek_v2|deepseek_mtp|gemma4|gpt_oss|granitemoe"
    r"|granitemoehybrid|granitemoeshared|glm4_moe_lite|glm4_moe_lite_mtp|glm4_moe_mtp|longcat_flash"
    r"|longcat_flash_mtp|minicpm|openai_privacy_filter|qwen2_moe|utils"
    r"|bailing_moe_v3)\.py": EXPERTS,
    r"models/(deepseek_v\d+|hy_v4)/.*\.py": EXPERTS,
    r"models/.*/(moe|mega_moe|fi_moe)\.py": EXPERTS,
    rf"{_VLLM}/(gemma4_dspark|lilicorr|llama_eagle3|qwen3_dflash|qwen3_eagle3"
    r"|qwen3_xpress)\.py": DRAFTS,
    r"models/.*/(dspark|dspark_mla|dflash2)\.py": DRAFTS,
    rf"{_VLLM}/(bagel|laguna|longcat_flash_ngram|mimo_v2|mimo_v2_mtp|molmo|molmo2"
    r"|openpangu)\.py": NO_LINEAR,
    r"models/inkling/(amd|nvidia)/short_conv\.py": NO_LINEAR,
}


def touches(source: str) -> dict[str, list[str]]:
    """Loading functions of one file that touch tensors, with the expressions that do."""
    functions: dict[str, list[ast.FunctionDef]] = defaultdict(list)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name not in ("forward", "__init__"):
            functions[node.name].append(node)
    wanted = {name for name, nodes in functions.items() if any(map(_is_loading, nodes))}
    while (
        called := {
            callee
            for name in wanted
            for node in functions[name]
            for callee in _called(node)
            if callee in functions
        }
        - wanted
    ):
        wanted |= called
    found = {
        name: [line for node in functions[name] for line in _expressions(node)]
        for name in sorted(wanted)
    }
    return {name: lines for name, lines in found.items() if lines}


def _is_loading(node: ast.FunctionDef) -> bool:
    names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    yields = any(isinstance(each, ast.Yield | ast.YieldFrom) for each in ast.walk(node))
    arguments = {argument.arg for argument in node.args.args}
    handles = "loaded_weight" in names | arguments or (yields and "weights" in arguments)
    return LOADING.fullmatch(node.name) is not None or handles


def _called(node: ast.FunctionDef) -> set[str]:
    calls = [each.func for each in ast.walk(node) if isinstance(each, ast.Call)]
    return {
        each.attr if isinstance(each, ast.Attribute) else each.id
        for each in calls
        if isinstance(each, ast.Attribute | ast.Name)
    }


def _expressions(node: ast.FunctionDef) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute):
            text = ast.unparse(each)
            if each.func.attr in TOUCHES and not NAME_SPLIT.search(text):
                yield text
        elif _is_layout(each) or _is_cut(each):
            yield ast.unparse(each)


def _is_layout(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr in LAYOUT | {"T", "mT"}
    return isinstance(node, ast.Constant) and node.value in LAYOUT


def _is_cut(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Slice | ast.Tuple)
        and ast.unparse(node.value) in ("loaded_weight", "weight", "tensor")
    )


def survey(folder: Path) -> dict[str, dict[str, list[str]]]:
    """By file below `vllm/`: its functions that touch tensors."""
    found = {}
    for place in FOLDERS:
        for file in sorted((folder / "vllm" / place).rglob("*.py")):
            source = file.read_text()
            if "weight" in source and "ops" not in file.parts and (lines := touches(source)):
                found[file.relative_to(folder / "vllm").as_posix()] = lines
    return found


def verdict(file: str) -> str | None:
    """What the file was found to do, None where nobody has read it."""
    return next((said for known, said in READ.items() if re.fullmatch(known, file)), None)


def main(arguments: list[str]) -> int:
    folders = [Path(argument) for argument in arguments]
    if not folders:
        spec = find_spec("vllm")
        if spec is None or spec.origin is None:
            print("no vLLM is installed; name a folder that holds vllm/", file=sys.stderr)
            return 2
        folders = [Path(spec.origin).parent.parent]
    missing = 0
    for folder in folders:
        found = survey(folder)
        for file, functions in found.items():
            said = verdict(file)
            print(f"{file}: {said or 'NOT READ'}")
            if said is None:
                missing += 1
                for name, lines in functions.items():
                    print(f"    {name}: {'; '.join(lines[:4])[:160]}")
        print(f"{folder}: {len(found)} files touch tensors while loading")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
