"""Checks what the headers say of a module against its scheme: names, dtypes, shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

from fusedq_kernels.dtype import DType
from fusedq_kernels.types import QuantSpec
from vllm_fusedq.checkpoint.safetensors_header import TensorInfo
from vllm_fusedq.errors import PreflightError, Problem
from vllm_fusedq.formats.layer import DTYPES, Dim, LayerFormat, Scheme, TensorLayout

REDO = "download the checkpoint again or quantize the model again"


def describe_layer(
    module: str, stored: Mapping[str, TensorInfo], scheme: Scheme, *, format: str, exclusion: str
) -> LayerFormat:
    """Check a module's headers against its scheme and describe it; `LayerFormat` has the words.

    N and K follow from the scheme or the header of the packed weight; all tensors have to agree.

    Raises:
        PreflightError: tensors are missing or unexpected, or have other dtypes or shapes.
    """
    weight = scheme.layouts[0]
    problems = _name_problems(module, stored, scheme.layouts)
    info = stored.get(weight.name)
    if info is None:
        raise PreflightError(problems)
    n, k = scheme.sizes or _sizes(weight, info)
    if not n * k:
        found = f"{weight.name} of shape {list(info.shape)}"
        supported = f"{len(weight.dims)} dimensions, none of them empty"
        raise PreflightError([*problems, Problem(module, found, supported, REDO)])
    group_size = k if scheme.group_size == -1 else scheme.group_size
    scale_dtype = scheme.scale_dtype
    if scale_dtype is None and scheme.scales in stored:
        scale_dtype = DTYPES.get(stored[scheme.scales].dtype)
    layer = LayerFormat(
        format=format,
        exclusion=exclusion,
        module=module,
        packing=scheme.packing,
        spec=QuantSpec(
            *(scheme.weight_type, group_size, scale_dtype or DType.FLOAT16), scheme.row_scaled
        ),
        n=n,
        k=k,
        tensors=scheme.layouts,
    )
    problems += _tensor_problems(layer, stored)
    if problems:
        raise PreflightError(problems)
    tensors = tuple(
        replace(layout, dtypes=(DTYPES[stored[layout.name].dtype],)) for layout in scheme.layouts
    )
    return replace(layer, tensors=tensors)


def unread(stored: Mapping[str, TensorInfo], names: Iterable[str]) -> tuple[TensorLayout, ...]:
    """Layouts of tensors that are loaded and not looked at, whatever their shapes."""
    return tuple(
        TensorLayout(
            name,
            tuple(Dim(None, size=size) for size in stored[name].shape),
            tuple(DTYPES.values()),
        )
        for name in names
        if name in stored
    )


def _sizes(weight: TensorLayout, info: TensorInfo) -> tuple[int, int]:
    """N and K by the header of the packed weight; zero where it is no matrix."""
    if len(info.shape) != len(weight.dims):
        return 0, 0
    sizes = {dim.axis: dim.logical(size) for dim, size in zip(weight.dims, info.shape, strict=True)}
    return sizes["n"], sizes["k"]


def _name_problems(
    module: str, stored: Mapping[str, TensorInfo], layouts: tuple[TensorLayout, ...]
) -> list[Problem]:
    expected = [layout.name for layout in layouts]
    names = ", ".join(expected)
    problems = []
    if missing := [name for name in expected if name not in stored]:
        found = f"no tensor {', '.join(missing)} (only {', '.join(sorted(stored))})"
        problems.append(Problem(module, found, f"modules with all of {names}", REDO))
    if extra := sorted(stored.keys() - set(expected) - {"bias"}):
        found = f"tensors with no known meaning here: {', '.join(extra)}"
        problems.append(Problem(module, found, f"{names} and bias", REDO))
    return problems


def _tensor_problems(layer: LayerFormat, stored: Mapping[str, TensorInfo]) -> list[Problem]:
    problems = []
    grid = f"{layer.n} out_features x {layer.k} in_features, group_size {layer.spec.group_size}"
    for layout in layer.tensors:
        info = stored.get(layout.name)
        if info is None:
            continue
        dtype = DTYPES.get(info.dtype)
        if dtype not in layout.dtypes:
            names = [name for name, known in DTYPES.items() if known in layout.dtypes]
            found = f"{layout.name} stored as {info.dtype}"
            problems.append(Problem(layer.module, found, " or ".join(names), REDO))
        if not layer.fits(layout, info.shape, dtype or layout.dtype):
            found = f"{layout.name} of shape {list(info.shape)}"
            expected = list(layer.stored_shape(layout))
            supported = f"{expected} for {grid}"
            if layout.flat is not None:
                supported = f"the {prod(expected)} elements of {layout.flat} {supported}"
            problems.append(Problem(layer.module, found, supported, REDO))
    return problems
