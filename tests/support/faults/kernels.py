"""Faults of layouts, kernels and what they refuse."""

from faults.fault import Fault

_KERNELS = "kernels/fusedq_kernels"
_PACKING = "tests/kernel_library/layouts/test_packing.py"
_GEMM, _CPU = "tests/kernel_library/cuda/test_gemm.py", "tests/kernel_library/cpu/test_fused.py"
_ROW_SCALES = "tests/kernel_library/test_row_scales.py"
_CPU_EXPERTS = "tests/kernel_library/cpu/test_fused_experts.py"

KERNEL_FAULTS = (
    # Layouts
    Fault(
        "P4 has its second and third plane exchanged",
        f"{_KERNELS}/layouts/bits.py",
        "planes = codes.view(codes.shape[0], -1, 4, 32)",
        "planes = codes.view(codes.shape[0], -1, 4, 32)[:, :, [0, 2, 1, 3]]",
        (f"{_PACKING}::test_p4_by_hand",),
    ),
    Fault(
        "PL4 has the second of each pair first",
        f"{_KERNELS}/layouts/bits.py",
        "octets = planes[..., 0] | (planes[..., 1] << 4)\n    # Little",
        "octets = planes[..., 1] | (planes[..., 0] << 4)\n    # Little",
        (f"{_PACKING}::test_pl4_by_hand",),
    ),
    Fault(
        "padding in front of a rank's first row is left out",
        f"{_KERNELS}/geometry.py",
        "pad = phase % step\n",
        "pad = 0\n",
        (f"{_PACKING}::test_group_geometry",),
    ),
    Fault(
        "rows that share a word of scales are exchanged",
        f"{_KERNELS}/layouts/scales.py",
        "_UNIT // 2, words.vectors, words.vector)\n            .permute(3, 0, 2, 4, 1)",
        "_UNIT // 2, words.vectors, words.vector)\n            .permute(3, 0, 2, 4, 1).flip(-1)",
        (f"{_PACKING}::test_two_rows_share_a_word_by_hand",),
    ),
    Fault(
        "a stored zero point loses its highest bit",
        f"{_KERNELS}/layouts/scales.py",
        "return scales, groups.to(torch.uint8)",
        "return scales, (groups & 127).to(torch.uint8)",
        (f"{_PACKING}::test_round_trip",),
    ),
    # Decoders in Triton
    Fault(
        "bf16 codes of 8 bits lose what their highest bit is worth",
        f"{_KERNELS}/cuda/integers.py",
        "return _minus(shifted, (zero - 128)[:, None], INTERPRET)",
        "return _minus(shifted, zero[:, None], INTERPRET)",
        (f"{_GEMM}::test_every_8_bit_code_is_exact",),
    ),
    Fault(
        "planes of four bits come in another order",
        f"{_KERNELS}/cuda/integers.py",
        "            (words >> 4) & _PAIR_MASK,\n            (words >> 8) & _PAIR_MASK,\n",
        "            (words >> 8) & _PAIR_MASK,\n            (words >> 4) & _PAIR_MASK,\n",
        (f"{_GEMM}::test_one_hot_tokens_return_the_weight_exactly",),
    ),
    Fault(
        "codebook pairs are exchanged",
        f"{_KERNELS}/cuda/codebook.py",
        "return low | (high << 16)",
        "return high | (low << 16)",
        (f"{_GEMM}::test_one_hot_tokens_return_the_weight_exactly",),
    ),
    Fault(
        "8-bit floats are twice as large",
        f"{_KERNELS}/cuda/floats.py",
        "2.0 ** (128 - (1",
        "2.0 ** (129 - (1",
        (f"{_GEMM}::test_every_8_bit_float_is_exact",),
    ),
    Fault(
        "rows of x before the rank's first are multiplied",
        f"{_KERNELS}/cuda/gemm_kernel.py",
        "rows = (k + (offs_k + sub // PARTS * ROWS)).to(tl.uint32)",
        "rows = (k + pad + (offs_k + sub // PARTS * ROWS)).to(tl.uint32)",
        (f"{_GEMM}::test_one_hot_tokens_return_the_weight_exactly",),
    ),
    # Decoders in C++
    Fault(
        "bf16 codes are read one place further in the table (AVX-512 BF16)",
        f"{_KERNELS}/native/decode.h",
        ": (i & 15) - 8.0f;",
        ": (i & 15) - 7.0f;",
        (f"{_CPU}::test_one_hot_tokens_read_the_weight_itself",),
    ),
    Fault(
        "zero points are added",
        f"{_KERNELS}/native/scales.cpp",
        "zeros[unit] = __builtin_convertvector(each & 0xFFFF, Floats);",
        "zeros[unit] = -__builtin_convertvector(each & 0xFFFF, Floats);",
        (f"{_CPU}::test_one_hot_tokens_read_the_weight_itself",),
    ),
    Fault(
        "subnormal 8-bit floats become zero (AVX-512 BF16)",
        f"{_KERNELS}/native/decode.h",
        ": codes == Codes::kFloatE4M3 ? i * 0x1p-9f",
        ": codes == Codes::kFloatE4M3 ? i * 0x0p-9f",
        (f"{_CPU}::test_every_8_bit_float_is_exact",),
    ),
    Fault(
        "subnormal fp16 scales are taken for normal ones",
        f"{_KERNELS}/native/scales.h",
        "const Words finite = exponent == 0 ? (Words)subnormal : normal;",
        "const Words finite = normal;",
        (f"{_CPU}::test_subnormal_scales_are_exact",),
    ),
    Fault(
        "infinite activations become numbers",
        f"{_KERNELS}/native/scales.h",
        "exponent == 0x0F800000 ? magnitude | 0x7F800000 : finite",
        "exponent == 0x0F800000 ? finite : finite",
        (f"{_CPU}::test_infinite_and_missing_numbers_are_passed_on",),
    ),
    Fault(
        "scales of rows are not multiplied",
        f"{_KERNELS}/native/product.h",
        "if (out.row_scales) value *= load<Floats>(out.row_scales + part.first + n);",
        "",
        (f"{_ROW_SCALES}::test_every_kernel_multiplies_by_both",),
    ),
    # Experts and refusals
    Fault(
        "weights of a token's experts are not those of its slots",
        f"{_KERNELS}/native/experts.h",
        "splat(weights[sorted.order[rows[i]]])",
        "splat(weights[rows[i]])",
        (f"{_CPU_EXPERTS}::test_ids_without_a_place_and_an_expert_chosen_twice",),
    ),
    Fault(
        "in_features that are no multiple of 16 are taken",
        f"{_KERNELS}/choose/refusals.py",
        "    if k % 16:\n",
        "    if k % 8:\n",
        ("tests/kernel_library/choose/test_refusals.py",),
    ),
)
