"""Runs a Gluon kernel for Hopper on a CPU: each partition of its warps is a thread.

What is checked is what its author decides: which block is copied where and when, which barrier is
waited for in which phase, what is multiplied. Layouts of registers are not modelled (the compiler
asserts that they fit). A copy lands as late as it may, when somebody waits for its barrier, and
what it will overwrite is spoilt as soon as it is asked for; a product reads its operand again when
it is waited for, and both must be equal. So a wait that is missing, or too early a release of a
stage, is a wrong number or an error, and a barrier that never completes is a `TimeoutError`.
"""

import importlib.util
import queue
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch

from ptx_emulation import MASK, Ptx

PATIENCE = 20.0  # seconds until a wait is taken for a deadlock


class Value(torch.Tensor):
    """A tensor in registers."""

    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else super().to(dtype)


def _value(tensor: torch.Tensor) -> Value:
    return tensor.as_subclass(Value)


class Pointer:
    """Into a flat tensor, at offsets."""

    def __init__(self, tensor: torch.Tensor, at=0) -> None:
        self.tensor, self.at = tensor, at

    def __add__(self, offset):
        return Pointer(self.tensor, self.at + offset)


class Shared:
    """A buffer in shared memory, or part of one."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.dtype, self.shape = tensor, tensor.dtype, tensor.shape
        self.type = SimpleNamespace(shape=list(tensor.shape))

    def index(self, at):
        return Shared(self.tensor[int(at)])

    def slice(self, start, length, dim):
        return Shared(self.tensor.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.tensor.permute(order))

    def load(self, layout):
        return _value(self.tensor.clone())

    def store(self, value):
        self.tensor.copy_(value)


class Descriptor:
    """Of a matrix, for blocks of a shape; outside the matrix it reads zero and writes nothing."""

    def __init__(self, tensor: torch.Tensor, block: list[int]) -> None:
        self.tensor, self.dtype, self.layout = tensor, tensor.dtype, None
        nbytes = block[0] * block[1] * tensor.element_size()
        self.block_type = SimpleNamespace(shape=list(block), nbytes=nbytes)

    def window(self, corner) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Where the block lies in the matrix, and the same within the block."""
        sizes = zip(corner, self.block_type.shape, self.tensor.shape, strict=True)
        ends = [(int(at), max(0, min(int(at) + size, whole))) for at, size, whole in sizes]
        outer = tuple(slice(max(0, at), max(0, end)) for at, end in ends)
        inner = tuple(slice(max(0, -at), max(0, end - at)) for at, end in ends)
        return outer, inner


class Barrier:
    """A phase completes when `count` have arrived and all bytes that are expected have come."""

    def __init__(self, count: int) -> None:
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0
        self.changed, self.copies = threading.Condition(), queue.SimpleQueue()

    def arrive(self, count=1, expect=0, came=0):
        with self.changed:
            self.pending -= count
            self.bytes += expect - came
            if self.pending < 0:
                raise RuntimeError("more arrivals than the barrier counts")
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase ^ 1, self.count
                self.changed.notify_all()

    def wait(self, phase):
        until = time.monotonic() + PATIENCE
        with self.changed:
            while self.phase == int(phase) and time.monotonic() < until:
                if self.copies.empty():
                    self.changed.wait(0.01)
                else:
                    self.arrive(0, came=self.copies.get()())
            if self.phase == int(phase):
                raise TimeoutError(f"phase {int(phase)} of a barrier never completes")


class Barriers:
    def __init__(self, number: int) -> None:
        self.all: list[Barrier | None] = [None] * number

    def index(self, at):
        return SimpleNamespace(of=self, at=int(at))


def _barrier(place) -> Barrier:
    return place.of.all[place.at]


class Machine:
    """What one program has of its own."""

    def __init__(self, program: int, programs: int) -> None:
        self.program, self.programs = program, programs
        self.failed: list[BaseException] = []

    def async_load(self, desc, corner, barrier, buffer):
        buffer.tensor.fill_(_SPOILT[buffer.dtype])

        def land():
            outer, inner = desc.window(corner)
            buffer.tensor.zero_()
            buffer.tensor[inner] = desc.tensor[outer]
            return desc.block_type.nbytes

        _barrier(barrier).copies.put(land)

    def async_store(self, desc, corner, buffer):
        outer, inner = desc.window(corner)
        desc.tensor[outer] = buffer.tensor[inner]

    def warp_specialize(self, functions, warps, registers):
        threads = [
            threading.Thread(target=self._run, args=(function, args), daemon=True)
            for function, args in functions
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        if self.failed:
            raise self.failed[0]

    def _run(self, function: Callable, args: tuple) -> None:
        try:
            function(*args)
        except BaseException as error:
            self.failed.append(error)


_SPOILT = {torch.bfloat16: float("nan"), torch.float16: float("nan"), torch.int32: -1}


class _Running:
    """A sum that the tensor cores may still be adding to."""

    def __init__(self, acc, products) -> None:
        self.acc, self.products = acc, products


def _warpgroup_mma(a, b, acc, is_async=False):
    assert is_async
    products = acc.products if isinstance(acc, _Running) else []
    acc = acc.acc if isinstance(acc, _Running) else acc
    return _Running(acc, [*products, (a, b, a.float() @ b.tensor.float())])


def _warpgroup_mma_wait(pending, deps):
    assert pending == 0
    running, *others = deps
    acc = running.acc
    for a, b, product in running.products:
        if not torch.equal(a.float() @ b.tensor.float(), product):
            raise RuntimeError("an operand of a running product was overwritten")
        acc = acc + product
    return acc, *others


def _inline_asm(asm, constraints, operands, dtype, is_pure, pack):
    first = constraints.count("=")
    words = torch.broadcast_tensors(*(each.as_subclass(torch.Tensor) for each in operands))
    ptx = Ptx(**{f"${first + i}": each.long() & MASK for i, each in enumerate(words)})
    ptx.run(asm)
    found = [ptx.values[f"${i}"] for i in range(first)]
    signed = [_value(torch.where(each > MASK >> 1, each - MASK - 1, each).int()) for each in found]
    return signed[0] if len(signed) == 1 else tuple(signed)


def _load(pointer, mask=None, other=0.0):
    at = torch.as_tensor(pointer.at)
    if mask is not None:
        at = torch.where(mask, at, 0)
    values = pointer.tensor[at.long().as_subclass(torch.Tensor)]
    return _value(values if mask is None else torch.where(mask, values, other))


def load_kernel(
    name: str, machine: Callable[[], Machine], change: Callable[[str], str] = str
) -> ModuleType:
    """Module `name` once more, its Gluon replaced; `machine()` is the one that runs.

    `change` is applied to its text.
    """
    language = SimpleNamespace(
        constexpr=lambda value: value,
        program_id=lambda axis: machine().program,
        num_programs=lambda axis: machine().programs,
        to_tensor=lambda value: value,
        minimum=min,
        where=lambda condition, one, other: one if condition else other,
        static_range=range,
        arange=lambda start, end, layout: _value(torch.arange(start, end, dtype=torch.int32)),
        load=_load,
        zeros=lambda shape, dtype, layout: _value(torch.zeros(shape, dtype=dtype)),
        expand_dims=lambda value, dim: value.unsqueeze(dim),
        reshape=lambda value, shape: value.reshape(shape),
        permute=lambda value, order: value.permute(order),
        join=lambda one, other: _value(torch.stack((one, other), -1)),
        split=lambda value: value.unbind(-1),
        convert_layout=lambda value, layout, assert_trivial: value,
        inline_asm_elementwise=_inline_asm,
        allocate_shared_memory=_allocate,
        warp_specialize=lambda *args: machine().warp_specialize(*args),
        DistributedLinearLayout=_layout,
        SliceLayout=_layout,
        NVMMADistributedLayout=_layout,
        DotOperandLayout=_layout,
        **{each: getattr(torch, each) for each in ("int16", "int32", "int64", "float32")},
    )
    hopper = SimpleNamespace(
        fence_async_shared=lambda: None,
        warpgroup_mma=_warpgroup_mma,
        warpgroup_mma_wait=_warpgroup_mma_wait,
        mbarrier=SimpleNamespace(
            MBarrierLayout=_layout,
            init=lambda place, count: place.of.all.__setitem__(place.at, Barrier(count)),
            expect=lambda place, nbytes: _barrier(place).arrive(1, expect=nbytes),
            arrive=lambda place, count: _barrier(place).arrive(count),
            wait=lambda place, phase: _barrier(place).wait(phase),
        ),
        tma=SimpleNamespace(
            async_load=lambda *args: machine().async_load(*args),
            async_store=lambda *args: machine().async_store(*args),
            store_wait=lambda pending: None,
        ),
    )
    gluon = SimpleNamespace(jit=_jit, language=language)
    replaced = {
        "triton.experimental": SimpleNamespace(gluon=gluon),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": language,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
    }
    found = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(found)
    before = {each: sys.modules.get(each) for each in replaced}
    sys.modules.update(replaced)
    try:
        text = change(found.loader.get_source(name))
        exec(compile(text, found.origin, "exec"), module.__dict__)
    finally:
        for each, real in before.items():
            sys.modules.pop(each)
            if real is not None:
                sys.modules[each] = real
    return module


def _jit(function=None, **options):
    return function if function is not None else lambda wanted: wanted


def _layout(*args, **kwargs):
    return None


def _allocate(dtype, shape, layout):
    if dtype == torch.int64:
        return Barriers(shape[0])
    return Shared(torch.full(shape, _SPOILT[dtype], dtype=dtype))
