"""Writes docs/errors.md from the source: every message that a user can be shown.

    python scripts/error_catalogue.py [--check]

Reads the syntax tree alone, so that nothing has to be imported or raised. What a message takes from
a checkpoint stands in it as <name>. `--check` writes nothing and fails where the file is not up to
date.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "errors.md"
SOURCES = (
    *sorted((ROOT / "vllm_fusedq").rglob("*.py")),
    ROOT / "kernels/fusedq_kernels/choose/refusals.py",
)

# Callables that make a message, by the names of the arguments that matter.
RAISED = {
    "CheckpointError",
    "RepositoryError",
    "UnsupportedCheckpoint",
    "WeightLoadError",
    "KernelError",
    "OutputError",
    "ComparisonError",
    "EngineError",
    "DeviceMemoryError",
    "MissingExtra",
    "SettingsError",
}
PROBLEM = ("found", "supported", "fix")
PARTS = {
    "Problem": ("layer", *PROBLEM),
    "single": ("layer", *PROBLEM),
    "refusal": PROBLEM,
    "Reason": PROBLEM,
    "Warned": ("layer", "message"),
}
_DEFAULTS = {
    "refusal": ("vllm_fusedq/formats/base.py", "refusal"),
}
FACTS = {"_fail": "not a usable safetensors file: "}
HEAD = """# Errors

Every message that a user can be shown, written from the source by `scripts/error_catalogue.py`.
What a message takes from the checkpoint or the command line stands in it as `<name>`. A layer's
problem reads "LAYER: found FOUND; supported: SUPPORTED; WHAT TO DO", and all problems of a
checkpoint are listed at once. Nothing is replaced silently: a server that starts runs every
quantized layer fused.

The types, all `RuntimeError`s of `vllm_fusedq.errors`:

| type | means |
| --- | --- |
| `CheckpointError` | a file is missing, damaged or unsafe to read |
| `RepositoryError` | the hub does not give the repository |
| `UnsupportedCheckpoint` | an option that concerns the whole checkpoint |
| `PreflightError` | layers that cannot run fused, one problem each |
| `WeightLoadError` | a tensor that does not fit, is missing or holds bad values |
| `KernelError` | a kernel that does not run on this machine, or is wrong on it |
| `OutputError` | a result that cannot be written |
| `ComparisonError` | models or texts that allow no comparison |
| `EngineError` | vLLM's engine ended without an answer |
| `DeviceMemoryError` | what is to be measured does not fit the device |
| `MissingExtra` | an optional dependency that is not installed |
| `SettingsError` | a wrong `--additional-config` |
"""


class Texts:
    """Turns the expressions of one file into text, following names to what they were assigned."""

    def __init__(self, tree: ast.Module) -> None:
        self.module = _assignments(tree.body)
        self.local: dict[str, list[ast.expr]] = {}

    def enter(self, function: ast.AST) -> None:
        self.local = _assignments(list(ast.walk(function)))

    def of(self, node: ast.expr, depth: int = 0) -> str:
        match node:
            case ast.Constant(value=str(text)):
                return text
            case ast.JoinedStr(values=values):
                return "".join(self.of(value, depth) for value in values)
            case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name):
                return self._named(name, depth)
            case ast.FormattedValue(value=value):
                return self.of(value, depth)
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                return self.of(left, depth) + self.of(right, depth)
            case ast.IfExp(body=body, orelse=other):
                return _either([self.of(body, depth), self.of(other, depth)])
            case ast.Attribute(attr=attr):
                return f"<{attr.strip('_')}>"
            case ast.Subscript(value=value):
                return self.of(value, depth)
            case ast.Call(
                func=ast.Attribute(attr="join"), args=[ast.GeneratorExp() | ast.Name() as of]
            ):
                return "<...>" if isinstance(of, ast.GeneratorExp) else self.of(of, depth + 9)
        return "<...>"

    def _named(self, name: str, depth: int) -> str:
        values = self.local.get(name) or self.module.get(name) or []
        texts = [self.of(value, depth + 1) for value in values] if depth < 3 else []
        texts = [text for text in dict.fromkeys(texts) if text.strip() and text != "<...>"]
        return _either(texts) if texts else f"<{name.strip('_').lower()}>"


def _either(texts: list[str]) -> str:
    texts = [text for text in dict.fromkeys(texts) if text]
    return texts[0] if len(texts) == 1 else f"({' | '.join(texts)})" if texts else ""


def _assignments(nodes: list[ast.AST] | list[ast.stmt]) -> dict[str, list[ast.expr]]:
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found.setdefault(name, []).append(value)
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                for target, value in zip(names, values, strict=False):
                    if isinstance(target, ast.Name):
                        found.setdefault(target.id, []).append(value)
    return found


def messages(source: Path) -> Iterator[tuple[str, ...]]:
    """(type, message) or ("problem", found, supported, fix) for each place that makes one."""
    tree = ast.parse(source.read_text())
    texts = Texts(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        # A rule that only passes its own arguments on makes no message
        if function.name in PARTS or function.name in FACTS:
            continue
        texts.enter(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                yield from _message(node, texts)


def _message(call: ast.Call, texts: Texts) -> Iterator[tuple[str, ...]]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in RAISED and call.args:
        yield name, texts.of(call.args[0])
    elif name in FACTS and len(call.args) == 2:
        yield "CheckpointError", f"<label>: {FACTS[name]}{texts.of(call.args[1])}"
    elif name in PARTS:
        given = dict(zip(PARTS[name], call.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        if name == "Warned":
            yield "warning", texts.of(given["message"])
        elif "found" in given:
            parts = [texts.of(given[part]) if part in given else "" for part in PROBLEM]
            yield "problem", *parts[:2], parts[2] or default_fix(name)


@cache
def default_fix(name: str) -> str:
    """The way out where a message names none: the default of the function that makes it."""
    if name not in _DEFAULTS:
        return ""
    file, function = _DEFAULTS[name]
    tree = ast.parse((ROOT / file).read_text())
    made = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == function
    )
    texts = Texts(tree)
    texts.enter(made)
    return texts.of(made.args.defaults[-1] if made.args.defaults else ast.Name("fix"))


def _says_something(row: tuple[str, ...]) -> bool:
    """Whether a row is more than what another function passed on."""
    return any(not re.fullmatch(r"<[\w.]+>", text) for text in row[1:-1] or row[1:] if text)


def catalogue() -> str:
    lines = [HEAD]
    for source in SOURCES:
        found = [row for row in dict.fromkeys(messages(source)) if _says_something(row)]
        if not found:
            continue
        lines.append(f"\n## {source.relative_to(ROOT).as_posix()}\n")
        problems = [row[1:] for row in found if row[0] == "problem"]
        if problems:
            lines += ["| found | supported | what to do |", "| --- | --- | --- |"]
            lines += [f"| {' | '.join(map(_cell, row))} |" for row in problems]
        others = [row for row in found if row[0] != "problem"]
        if problems and others:
            lines.append("")
        lines += [f"- **{kind}**: {_cell(text)}" for kind, text in others]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    text = catalogue()
    if "--check" not in sys.argv:
        TARGET.write_text(text)
    elif TARGET.read_text() != text:
        sys.exit("docs/errors.md is not up to date: run python scripts/error_catalogue.py")
