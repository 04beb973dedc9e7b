"""Packed forms: the exact bits by slow independent loops, and `unpack` as exact inverse."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedq_kernels.layouts import packing
from fusedq_kernels.testing import random_logical
from fusedq_kernels.types import (
    TILED_LAYOUTS,
    Layout,
    LogicalWeight,
    QuantSpec,
    WeightType,
    holds,
)

HALF = torch.float16
PER_CHANNEL = 4096
layouts = pytest.mark.parametrize("target", Layout, ids=lambda t: t.value)
four_bit = pytest.mark.parametrize(
    "weight_type", [WeightType.UINT4, WeightType.UINT4B8], ids=lambda t: t.value
)
held = pytest.mark.parametrize(
    ("target", "weight_type"),
    [(target, each) for target in Layout for each in WeightType if holds(target, each)],
    ids=lambda value: value.value,
)
# One type for each layout, with zero points where there is one.
TYPE_IN = {
    Layout.P4: WeightType.UINT4,
    Layout.P8: WeightType.UINT8,
    Layout.PL4: WeightType.NF4,
    Layout.CPU_WNA16: WeightType.UINT4,
}


def spec_of(weight_type: WeightType, group_size: int, scale_dtype=HALF) -> QuantSpec:
    return QuantSpec(weight_type, group_size, scale_dtype)


def assert_equal(found: LogicalWeight, expected: LogicalWeight) -> None:
    assert found.spec == expected.spec
    assert found.phase == expected.phase
    assert found.scales.dtype == expected.scales.dtype
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
    assert (found.zeros is None) == (expected.zeros is None)
    assert found.zeros is None or torch.equal(found.zeros, expected.zeros)


@pytest.mark.parametrize("group_size", [16, 24, 32, 48, 64, 128, 256, PER_CHANNEL])
@held
def test_round_trip(target: Layout, weight_type: WeightType, group_size: int) -> None:
    spec = spec_of(weight_type, group_size)
    phases = [p for p in (0, 8, 13, 16, 64, 100, 200) if p < group_size]
    for n, k, phase in itertools.product((1, 40, 136), (8, 128, 272, 1000), phases):
        logical = random_logical(n, k, spec, phase, seed=k)
        packed = packing.pack(logical, target, HALF)
        shapes = packing.packed_shapes(target, n, k, spec, phase, HALF)
        for name in ("qweight", "scales", "zeros"):
            tensor, expected = getattr(packed, name), shapes.get(name)
            found = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
            assert found == expected, (name, n, k, phase)
        assert_equal(packing.unpack(packed), logical)


# Rows of a plane, and by how many bits the next plane and the second of a pair are shifted.
BIT_ORDERS = {Layout.P4: (32, 4, 16), Layout.P8: (64, 8, 16), Layout.PL4: (32, 8, 4)}


@pytest.mark.parametrize(
    ("group_size", "k", "phase"), [(16, 72, 5), (64, 200, 32), (256, 136, 200)]
)
@pytest.mark.parametrize("weight_type", WeightType, ids=lambda t: t.value)
def test_tiled_bits(weight_type: WeightType, group_size: int, k: int, phase: int) -> None:
    logical = random_logical(6, k, spec_of(weight_type, group_size), phase)
    tiled = TILED_LAYOUTS[weight_type]
    plane_rows, plane_shift, pair_shift = BIT_ORDERS[tiled]
    bits = weight_type.bits
    pad = packing.group_geometry(k, group_size, phase).pad
    words = packing.pack(logical, tiled, HALF).qweight
    assert words.shape == (-(-(k + pad) // 128), 128, 128 * bits // 32)
    for n in range(6):
        for p in range(128 * words.shape[0]):
            row = p % 128
            j, w, b = row // plane_rows, row % plane_rows // 2, row % 2
            word = int(words[p // 128, n, w])
            code = (word >> (plane_shift * j + pair_shift * b)) & ((1 << bits) - 1)
            inside = 0 <= p - pad < k
            assert code == (int(logical.codes[n, p - pad]) if inside else 0)
    assert not words[:, 6:].any()


def test_p4_by_hand() -> None:
    spec = spec_of(WeightType.UINT4B8, 128)
    codes = torch.zeros((1, 128), dtype=torch.uint8)
    codes[0, [0, 1, 32, 33, 64, 65, 96, 97]] = torch.arange(1, 9, dtype=torch.uint8)
    codes[0, 127] = 15
    packed = packing.pack(
        LogicalWeight(codes, torch.ones((1, 1)).half(), None, spec), Layout.P4, HALF
    )
    # Word 0: bits 0, 4, 8, 12 hold rows 0, 32, 64, 96 and bits 16, 20, 24, 28 rows 1, 33, 65, 97.
    assert int(packed.qweight[0, 0, 0]) & 0xFFFFFFFF == 0x86427531
    assert int(packed.qweight[0, 0, 15]) & 0xFFFFFFFF == 0xF0000000


def test_p8_by_hand() -> None:
    codes = torch.zeros((1, 128), dtype=torch.uint8)
    codes[0, [0, 64, 1, 65]] = torch.tensor([0x12, 0x34, 0x56, 0x78], dtype=torch.uint8)
    codes[0, 127] = 255
    scales, zeros = torch.full((1, 1), -1.0).half(), torch.full((1, 1), 255, dtype=torch.uint8)
    logical = LogicalWeight(codes, scales, zeros, spec_of(WeightType.UINT8, 128))
    packed = packing.pack(logical, Layout.P8, HALF)
    assert int(packed.qweight[0, 0, 0]) & 0xFFFFFFFF == 0x78563412
    assert int(packed.qweight[0, 0, 31]) & 0xFFFFFFFF == 0xFF000000
    assert int(packed.scales[0, 0, 0]) & 0xFFFFFFFF == 0xBC0000FF


def test_pl4_by_hand() -> None:
    codes = torch.zeros((1, 128), dtype=torch.uint8)
    codes[0, [0, 1, 32, 33, 64, 65, 96, 97]] = torch.arange(1, 9, dtype=torch.uint8)
    codes[0, 127] = 15
    scales = torch.full((1, 1), 0.1)
    logical = LogicalWeight(codes, scales, None, spec_of(WeightType.NF4, 128, torch.float32))
    packed = packing.pack(logical, Layout.PL4, HALF)
    # Byte j of word 0 holds rows 32 j and, in its upper nibble, 32 j + 1.
    assert int(packed.qweight[0, 0, 0]) & 0xFFFFFFFF == 0x87654321
    assert int(packed.qweight[0, 0, 15]) & 0xFFFFFFFF == 0xF0000000
    assert packed.scales.dtype == torch.float32
    assert torch.equal(packed.scales[:, :1], scales[:, :, None])


def test_zero_points_by_hand() -> None:
    codes = torch.zeros((2, 32), dtype=torch.uint8)
    scales = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=HALF)
    zeros = torch.tensor([[3, 16], [0, 15]], dtype=torch.uint8)
    packed = packing.pack(
        LogicalWeight(codes, scales, zeros, spec_of(WeightType.UINT4, 16)), Layout.P4, HALF
    )
    # Groups of 16 come in vectors of four, eight to a block of 128.
    assert packed.scales.shape == (2, 128, 4)
    words = [[int(word) & 0xFFFFFFFF for word in row] for row in packed.scales[0, :3, :3]]
    assert words == [[0x3C000003, 0x40000010, 0], [0xBC000000, 0x3800000F, 0], [0, 0, 0]]
    assert not packed.scales[1].any()


def test_two_rows_share_a_word_by_hand() -> None:
    """Rows j and j + 8 of 16, the second one in the upper half; scales 1.0 to 20.0 and 0.5."""
    scales = torch.stack([torch.arange(1.0, 21.0), torch.full((20,), 0.5)], 1).to(HALF)
    codes = torch.zeros((20, 64), dtype=torch.uint8)
    packed = packing.pack(
        LogicalWeight(codes, scales, None, spec_of(WeightType.UINT4B8, 32)), Layout.P4, HALF
    )
    assert (packed.scales.shape, packed.scales.dtype) == ((1, 64, 4), torch.int32)
    words = [[int(word) & 0xFFFFFFFF for word in row] for row in packed.scales[0, :12, :3]]
    pairs = (0x48803C00, 0x49004000, 0x49804200, 0x4A004400, 0x4A804500, 0x4B004600, 0x4B804700)
    assert words[:8] == [[pair, 0x38003800, 0] for pair in (*pairs, 0x4C004800)]
    # Rows 16 to 19 have no partners.
    assert words[8:] == [[pair, 0x3800, 0] for pair in (0x4C40, 0x4C80, 0x4CC0, 0x4D00)]
    assert not packed.scales[0, 12:].any()


@pytest.mark.parametrize("group_size", [8, 16, 24, 32, 64, 96, 128, 256, PER_CHANNEL])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_type", WeightType, ids=lambda t: t.value)
def test_every_bit_of_a_scale_survives(
    weight_type: WeightType, scale_dtype: torch.dtype, group_size: int
) -> None:
    """Any bits, those of infinities and NaN too, of all rows and of some."""
    if weight_type.has_zero_points and scale_dtype is torch.float32:
        return
    tiled = TILED_LAYOUTS[weight_type]
    bits = {2: torch.int16, 4: torch.int32}[scale_dtype.itemsize]
    generator = torch.Generator().manual_seed(group_size)
    for n, k, phase in itertools.product((1, 40, 136), (8, 272, 1000), (0, 8, 13)):
        if phase >= group_size:
            continue
        spec = spec_of(weight_type, group_size, scale_dtype)
        logical = random_logical(n, k, spec, phase)
        limits = torch.iinfo(bits)
        shape = logical.scales.shape
        scales = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=bits)
        logical = replace(logical, scales=scales.view(scale_dtype))
        packed = packing.pack(logical, tiled, HALF)
        assert torch.equal(packing.unpack(packed).scales.view(bits), scales)
        rows = torch.randint(n, (5,), generator=generator)
        found = packing.gather(packed, rows)
        assert torch.equal(found.scales.view(bits), scales[rows])
        assert torch.equal(found.codes, logical.codes[rows])
        assert found.zeros is None or torch.equal(found.zeros, logical.zeros[rows])


@pytest.mark.parametrize(
    ("weight_type", "scale_dtype", "group_size", "bits"),
    [
        (WeightType.UINT4B8, torch.float16, 128, 4.125),
        (WeightType.UINT4B8, torch.bfloat16, 64, 4.25),
        (WeightType.UINT4B8, torch.float16, 32, 4.5),
        (WeightType.UINT4B8, torch.float16, 16, 5.0),
        (WeightType.UINT8B128, torch.bfloat16, 128, 8.125),
        (WeightType.NF4, torch.float16, 64, 4.25),
        (WeightType.NF4, torch.float32, 64, 4.5),
        (WeightType.UINT4B8, torch.float32, 128, 4.25),
        (WeightType.UINT4, torch.float16, 128, 4.25),
        (WeightType.UINT4, torch.float16, 32, 5.0),
    ],
)
def test_bits_per_weight(
    weight_type: WeightType, scale_dtype: torch.dtype, group_size: int, bits: float
) -> None:
    spec = spec_of(weight_type, group_size, scale_dtype)
    tiled = TILED_LAYOUTS[weight_type]
    packed = packing.empty_packed(tiled, 4096, 4096, spec, 0, HALF, "meta")
    assert 8 * sum(packing.weight_bytes(packed).values()) == bits * 4096 * 4096


@pytest.mark.parametrize(
    ("group_size", "k", "phase"), [(32, 64, 0), (48, 64, 20), (PER_CHANNEL, 40, 7)]
)
@four_bit
def test_wna16_bits(weight_type: WeightType, group_size: int, k: int, phase: int) -> None:
    n = 40
    logical = random_logical(n, k, spec_of(weight_type, group_size), phase)
    geometry = packing.wna16_geometry(k, group_size, phase)
    packed = packing.pack(logical, Layout.CPU_WNA16, torch.bfloat16)
    assert packed.qweight.shape == (64 // 16, 2 * geometry.k_padded)
    groups = (logical.scales.shape[1], geometry.k_padded // geometry.num_groups)
    for out in range(n):
        for p in range(geometry.k_padded):
            word = int(packed.qweight[out // 16, 2 * p + out % 16 // 8])
            code = (word >> (4 * (out % 8))) & 15
            feature, group = p - geometry.pad, p // groups[1]
            if 0 <= feature < k:
                assert code == int(logical.codes[out, feature])
                assert packed.scales[group, out] == logical.scales[out, group].bfloat16()
            elif group < groups[0]:
                assert code == (8 if logical.zeros is None else int(logical.zeros[out, group]))
            else:
                assert packed.scales[group, out] == 0
            if logical.zeros is not None and group < groups[0]:
                zero = (int(packed.zeros[group, out // 8]) >> (4 * (out % 8))) & 15
                assert zero == int(logical.zeros[out, group])
    assert not packed.scales[:, n:].any()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((4096, 128, 0), (128, 0, 0, 32, 4096)),
        ((4096, 4096, 0), (128, 0, 0, 1, 4096)),
        ((1000, 4096, 96), (128, 0, 0, 1, 1024)),
        ((6848, 128, 64), (128, 64, 0, 54, 6912)),
        ((864, 32, 8), (32, 8, 0, 28, 896)),
        ((512, 256, 200), (128, 72, 128, 3, 640)),
        ((128, 96, 40), (32, 8, 32, 2, 256)),
    ],
)
def test_group_geometry(args: tuple[int, int, int], expected: tuple[int, ...]) -> None:
    geometry = packing.group_geometry(*args)
    assert geometry == packing.GroupGeometry(*expected)
    k, group_size, phase = args
    for feature in range(k):
        p = feature + geometry.pad
        if geometry.num_groups > 1:
            assert (p + geometry.offset) // group_size == (feature + phase) // group_size
            first = p // geometry.step * geometry.step
            last = first + geometry.step - 1
            assert (first + geometry.offset) // group_size == (last + geometry.offset) // group_size


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((4096, 128, 0), (0, 32, 4096)),
        ((4096, 128, 64), (64, 33, 4224)),
        ((48, 16, 0), (0, 4, 64)),
        ((72, 24, 0), (0, 4, 96)),
        ((100, 4096, 50), (0, 1, 128)),
    ],
)
def test_wna16_geometry(args: tuple[int, int, int], expected: tuple[int, ...]) -> None:
    assert packing.wna16_geometry(*args) == packing.Wna16Geometry(*expected)


@held
def test_pack_rows_equals_pack(target: Layout, weight_type: WeightType) -> None:
    logical = random_logical(200, 72, spec_of(weight_type, 32), phase=8)
    whole = packing.pack(logical, target, HALF)
    parts = packing.empty_packed(target, 200, 72, logical.spec, 8, HALF, "cpu")
    for start, stop in ((160, 200), (0, 96), (96, 160)):
        zeros = None if logical.zeros is None else logical.zeros[start:stop]
        rows = replace(
            logical, codes=logical.codes[start:stop], scales=logical.scales[start:stop], zeros=zeros
        )
        packing.pack_rows(parts, start, rows)
    for name in ("qweight", "scales", "zeros"):
        found, expected = getattr(parts, name), getattr(whole, name)
        assert found is expected is None or torch.equal(found, expected), name


@layouts
def test_strided_codes(target: Layout) -> None:
    logical = random_logical(40, 64, spec_of(TYPE_IN[target], 32))
    strided = replace(
        logical,
        codes=logical.codes.t().contiguous().t(),
        scales=logical.scales.t().contiguous().t(),
        zeros=None if logical.zeros is None else logical.zeros.t().contiguous().t(),
    )
    assert_equal(packing.unpack(packing.pack(strided, target, HALF)), logical)


@held
def test_meta_device(target: Layout, weight_type: WeightType) -> None:
    logical = random_logical(40, 72, spec_of(weight_type, 32), phase=8)
    on_meta = replace(
        logical,
        codes=logical.codes.to("meta"),
        scales=logical.scales.to("meta"),
        zeros=None if logical.zeros is None else logical.zeros.to("meta"),
    )
    packed, real = packing.pack(on_meta, target, HALF), packing.pack(logical, target, HALF)
    assert packed.qweight.is_meta
    assert packed.qweight.shape == real.qweight.shape
    assert packing.weight_bytes(packed) == packing.weight_bytes(real)
    assert packing.unpack(packed).codes.shape == logical.codes.shape


def test_scales_survive_per_layout() -> None:
    logical = random_logical(32, 64, spec_of(WeightType.UINT4B8, 32, torch.float32))
    assert_equal(packing.unpack(packing.pack(logical, Layout.P4, HALF)), logical)
    scales = packing.unpack(packing.pack(logical, Layout.CPU_WNA16, HALF)).scales
    assert torch.equal(scales, logical.scales.half())


def test_weight_bytes() -> None:
    spec = spec_of(WeightType.UINT4, 32)
    packed = packing.empty_packed(Layout.P4, 100, 256, spec, 0, HALF, "meta")
    assert packing.weight_bytes(packed) == {"qweight": 128 * 256 // 2, "scales": 8 * 128 * 4}
    eight = spec_of(WeightType.UINT8B128, 32)
    packed = packing.empty_packed(Layout.P8, 100, 256, eight, 0, HALF, "meta")
    assert packing.weight_bytes(packed) == {"qweight": 128 * 256, "scales": 8 * 128 * 2}
    packed = packing.empty_packed(Layout.CPU_WNA16, 100, 256, spec, 0, HALF, "meta")
    expected = {"qweight": 128 * 256 // 2, "scales": 8 * 128 * 2, "zeros": 8 * 128 // 2}
    assert packing.weight_bytes(packed) == expected


class LargestTemporary(TorchDispatchMode):
    """Bytes of the largest tensor that any operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in inputs:
                self.bytes = max(self.bytes, storage.nbytes())
        return result


@pytest.mark.parametrize("phase", [0, 64])
@layouts
def test_packing_memory_is_bounded(target: Layout, phase: int) -> None:
    logical = random_logical(4096, 2048, spec_of(TYPE_IN[target], 128), phase)
    packed = packing.empty_packed(target, 4096, 2048, logical.spec, phase, HALF, "cpu")
    with LargestTemporary() as largest:
        packing.pack_rows(packed, 0, logical)
    # P8 without padding is one copy.
    assert bool(largest.bytes) == (target is not Layout.P8 or phase > 0)
    assert largest.bytes <= 1.2 * 2**20


SPEC, ASYMMETRIC = spec_of(WeightType.UINT4B8, 32), spec_of(WeightType.UINT4, 32)
GOOD = random_logical(64, 64, ASYMMETRIC)


@pytest.mark.parametrize(
    ("rows", "start", "target", "message"),
    [
        (replace(GOOD, spec=SPEC), 0, Layout.P4, "do not belong in a weight of"),
        (replace(GOOD, phase=1), 0, Layout.P4, "phase 1, k 64 do not belong"),
        (replace(GOOD, codes=GOOD.codes[:, :32]), 0, Layout.P4, "k 32 do not belong"),
        (GOOD, 16, Layout.P4, "rows 16:80 of 128 must start and end at multiples of 32"),
        (GOOD, 96, Layout.P4, "rows 96:160 of 128 must"),
        (replace(GOOD, codes=GOOD.codes[:40]), 0, Layout.P4, "rows 0:40 of 128 must"),
        (replace(GOOD, codes=GOOD.codes.int()), 0, Layout.P4, "codes must be .* torch.uint8"),
        (replace(GOOD, codes=GOOD.codes + 1), 0, Layout.P4, "codes .* must be below 16, got 16"),
        (replace(GOOD, scales=GOOD.scales.float()), 0, Layout.P4, "scales must be"),
        (replace(GOOD, scales=GOOD.scales[:, :1]), 0, Layout.P4, r"scales must be \(64, 2\)"),
        (replace(GOOD, zeros=None), 0, Layout.P4, "zeros must be .* got None"),
        (replace(GOOD, zeros=GOOD.zeros + 2), 0, Layout.P4, "zeros .* below 17, got 17"),
        (replace(GOOD, zeros=GOOD.zeros + 1), 0, Layout.CPU_WNA16, "zeros .* below 16, got 16"),
    ],
)
def test_bad_rows(rows: LogicalWeight, start: int, target: Layout, message: str) -> None:
    packed = packing.empty_packed(target, 128, 64, ASYMMETRIC, 0, HALF, "cpu")
    with pytest.raises(ValueError, match=message):
        packing.pack_rows(packed, start, rows)


def test_zero_points_without_a_place() -> None:
    packed = packing.empty_packed(Layout.P4, 64, 64, SPEC, 0, HALF, "cpu")
    with pytest.raises(ValueError, match="uint4b8 has no zero points"):
        packing.pack_rows(packed, 0, replace(GOOD, spec=SPEC))


@pytest.mark.parametrize(
    ("target", "k", "spec", "phase", "act_dtype", "message"),
    [
        (Layout.P4, 0, SPEC, 0, HALF, "k must be positive, got 0"),
        (Layout.P4, 64, SPEC, 32, HALF, "phase 32 is not inside a group of 32 rows"),
        (Layout.P4, 64, SPEC, -1, HALF, "phase -1 is not inside"),
        (Layout.P4, 64, spec_of(WeightType.UINT4, 32, torch.float32), 0, HALF, "16-bit scale"),
        (Layout.P8, 64, spec_of(WeightType.UINT8, 32, torch.float32), 0, HALF, "16-bit scale"),
        (Layout.PL4, 64, SPEC, 0, HALF, "layout PL4 does not hold uint4b8"),
        (Layout.P4, 64, spec_of(WeightType.NF4, 64), 0, HALF, "layout P4 does not hold nf4"),
        (Layout.P8, 64, SPEC, 0, HALF, "layout P8 does not hold uint4b8"),
        (Layout.P4, 64, spec_of(WeightType.UINT8, 32), 0, HALF, "P4 does not hold uint8"),
        (Layout.CPU_WNA16, 64, spec_of(WeightType.UINT4, 33), 0, HALF, "even group size, got 33"),
        (Layout.CPU_WNA16, 64, SPEC, 0, torch.float32, "fp16 or bf16 activations"),
    ],
)
def test_schemes_a_layout_refuses(target, k, spec, phase, act_dtype, message) -> None:
    with pytest.raises(ValueError, match=message):
        packing.packed_shapes(target, 64, k, spec, phase, act_dtype)


def test_a_gpu_packs_a_layer_in_few_steps_and_without_a_copy_on_the_cpu() -> None:
    """Tensors of device meta stand for those of a GPU: whoever reads them back fails."""

    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                assert result.is_meta
            return result

    spec = QuantSpec(WeightType.UINT4, 128, torch.float16)
    n, k = 28672, 4096
    codes, zeros = (
        torch.zeros(size, dtype=torch.uint8, device="meta") for size in ((n, k), (n, k // 128))
    )
    scales = torch.zeros((n, k // 128), dtype=torch.float16, device="meta")
    with Counting() as counting:
        packing.pack(LogicalWeight(codes, scales, zeros, spec), Layout.P4, torch.float16)
    stripes = n * k / (1 << 24)
    assert counting.calls < 40 * stripes
