"""Equal problems of numbered layers as one."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

from vllm_fusedq.errors import Problem
from vllm_fusedq.names import fold, fold_experts, unexperted, unnumbered


def fold_problems(problems: Iterable[Problem]) -> list[Problem]:
    """Equal problems as one: `model.layers.0-31.mlp.experts.0-7.up_proj (256 layers)`.

    Only layers with the same experts fold together, so that a name stands for all that it spans.
    """
    counted = [(problem, 1) for problem in problems]
    counted = _folded(counted, unexperted, fold_experts)
    counted = _folded(counted, unnumbered, fold)
    return [
        replace(problem, layer=f"{problem.layer} ({count} layers)") if count > 1 else problem
        for problem, count in counted
    ]


def fold_names(names: Iterable[str]) -> list[str]:
    """Names that differ in the number of an expert alone as one each."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[unexperted(name)].append(name)
    return [fold_experts(each) for each in alike.values()]


def _folded(
    counted: Iterable[tuple[Problem, int]],
    kind: Callable[[str], str],
    name: Callable[[list[str]], str],
) -> list[tuple[Problem, int]]:
    alike: dict[tuple[str, ...], list[tuple[Problem, int]]] = defaultdict(list)
    for problem, count in counted:
        key = (kind(problem.layer), problem.found, problem.supported, problem.fix)
        alike[key].append((problem, count))
    found = []
    for members in alike.values():
        first, total = members[0][0], sum(count for _, count in members)
        if len(members) > 1:
            first = replace(first, layer=name([problem.layer for problem, _ in members]))
        found.append((first, total))
    return found
