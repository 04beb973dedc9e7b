"""Faults of formats, sharding, loading, plans and what they tell."""

from faults.fault import Fault

_PLUGIN = "vllm_fusedq"

PLUGIN_FAULTS = (
    # Sharding
    Fault(
        "the ranks' parts of in_features all begin at the first",
        f"{_PLUGIN}/plan/shards.py",
        "k_start = tp_rank * k_local if",
        "k_start = 0 * k_local if",
        ("tests/plan/test_shards.py",),
    ),
    Fault(
        "replicated key and value heads go round over the ranks",
        f"{_PLUGIN}/plan/shards.py",
        "head = tp_rank // (tp_size // heads)",
        "head = tp_rank % heads",
        ("tests/plan/test_shards.py::test_head_slices_replicate_whole_heads",),
    ),
    Fault(
        "the plan's phase of a rank that begins inside a group is forgotten",
        f"{_PLUGIN}/plan/layer.py",
        "rows, spec, phase = shard.k, first.spec, region.k_start % first.spec.group_size",
        "rows, spec, phase = shard.k, first.spec, 0",
        ("tests/load/test_loader.py::test_a_rank_that_starts_inside_a_group_has_a_phase",),
    ),
    # Zero conventions
    Fault(
        "GPTQ's zero points are stored as they are",
        f"{_PLUGIN}/formats/gptq_zeros.py",
        "return {self.minus_one: 1, self.as_they_are: 0}",
        "return {self.minus_one: 0, self.as_they_are: 0}",
        ("tests/formats/test_decode.py::test_the_whole_layer_from_a_file",),
    ),
    Fault(
        "a borrow of a GPTQ zero point of 0 is not given back",
        f"{_PLUGIN}/formats/gptq_zeros.py",
        "return _stored_zeros(qzeros + ONES[packing.bits], packing.bits, region).contiguous()",
        "return ((stored + 1) & top).contiguous()",
        ("tests/formats/test_gptq.py::test_zero_points_of_zero_that_v1_cannot_store",),
    ),
    Fault(
        "symmetric codes that are widened keep their own zero point",
        f"{_PLUGIN}/formats/shared/widening.py",
        "return codes.add_(shift) if shift else codes",
        "return codes",
        ("tests/formats/test_gptq.py::test_three_bit_words_by_hand",),
    ),
    Fault(
        "signed bytes are read as unsigned codes",
        f"{_PLUGIN}/formats/compressed_tensors_packing.py",
        "return values.contiguous().view(torch.uint8) + half",
        "return values.contiguous().view(torch.uint8)",
        ("tests/formats/test_decode.py::test_the_whole_layer_from_a_file",),
    ),
    Fault(
        "AWQ's nibbles come in order",
        f"{_PLUGIN}/formats/awq_packing.py",
        "ORDER = (0, 2, 4, 6, 1, 3, 5, 7)",
        "ORDER = (0, 1, 2, 3, 4, 5, 6, 7)",
        ("tests/formats/test_decode.py::test_awq_word_by_hand",),
    ),
    # Scales
    Fault(
        "NVFP4's scale of all is multiplied by where it is stored inverted",
        f"{_PLUGIN}/formats/float4_packing.py",
        "scale = stored.reciprocal() if self.reciprocal else stored",
        "scale = stored",
        ("tests/formats/test_float4.py::test_a_scale_of_all_that_is_stored_inverted",),
    ),
    Fault(
        "the offset of double quantization is left out",
        f"{_PLUGIN}/formats/bitsandbytes.py",
        "return levels * scales + offset",
        "return levels * scales",
        ("tests/formats/test_bitsandbytes.py::test_bitsandbytes_own_packing",),
    ),
    # Activation order
    Fault(
        "equal groups lose the order of their rows in a part of K",
        f"{_PLUGIN}/formats/shared/ordering.py",
        "within = torch.arange(region.k, device=g_idx.device) - first_row[sorted_groups]",
        "within = torch.arange(region.k, device=g_idx.device) * 0",
        ("tests/formats/test_ordering.py::test_any_region",),
    ),
    Fault(
        "rows that fill up a step are worth something",
        f"{_PLUGIN}/formats/shared/ordering.py",
        "codes[:, order.padding] = layer.spec.weight_type.bias",
        "codes[:, order.padding] = 0",
        ("tests/load/test_ordering.py::test_reordered_rows_are_worth_what_the_file_says",),
    ),
    Fault(
        "parts of a fused layer may have different orders",
        f"{_PLUGIN}/load/loader.py",
        "elif not torch.equal(perm.to(self.packed.perm.device), self.packed.perm):",
        "elif False:",
        ("tests/load/test_ordering.py::test_parts_of_one_layer_must_share_their_order",),
    ),
    # Experts
    Fault(
        "gate and up come one after the other",
        f"{_PLUGIN}/load/loader.py",
        "        return alternated(*halves)",
        "        return stack(halves)",
        ("tests/load/test_experts.py::test_every_build_is_resident_exactly",),
    ),
    Fault(
        "every rank adds the bias of the experts' w2",
        f"{_PLUGIN}/load/experts.py",
        "        if region.k_start:\n",
        "        if False:\n",
        (
            "tests/load/test_experts.py::test_each_rank_has_its_biases_and_the_first_alone_that_of_w2",
        ),
    ),
    # Loading
    Fault(
        "a layer is complete although tensors are missing",
        f"{_PLUGIN}/load/loader.py",
        "            if (part, stored.name) not in self._slices\n",
        "            if False\n",
        ("tests/load/test_loader.py::test_a_tensor_that_never_arrives_is_named",),
    ),
    Fault(
        "tensors of another dtype are cast",
        f"{_PLUGIN}/load/loader.py",
        "if tensor.dtype != dtype or not",
        "if not",
        ("tests/load/test_loader.py::test_bad_tensors_are_refused",),
    ),
    # Refusals
    Fault(
        "GPTQ zero points that an underflow destroyed are taken",
        f"{_PLUGIN}/formats/gptq_zeros.py",
        "    if bool((qzeros >> (32 - 2 * bits) == -1).any()):\n",
        "    if False:\n",
        ("tests/formats/test_gptq.py::test_refuses_zero_points_destroyed_by_an_underflow",),
    ),
    Fault(
        "scales that are no numbers are taken",
        f"{_PLUGIN}/formats/bitsandbytes.py",
        "        check_finite(absmax, layer.module, ABSMAX)\n",
        "",
        ("tests/formats/test_bitsandbytes.py::test_refuses_tensors_by_their_values",),
    ),
    # Capacity
    Fault(
        "a tied embedding is counted on the first stage alone",
        f"{_PLUGIN}/plan/capacity.py",
        "return (0, last) if tied and last else (0,)",
        "return (0,)",
        ("tests/plan/test_capacity.py::test_a_tied_embedding_is_on_the_first_and_the_last_stage",),
    ),
    Fault(
        "layers of another kind need as many blocks as their own number",
        f"{_PLUGIN}/plan/kv_pool.py",
        "size = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)",
        "size = max(sizes)",
        ("tests/plan/test_kv_pool.py::test_a_sequence_takes_what_vllm_says",),
    ),
    # Texts of the plan
    Fault(
        "layers with other launches are folded into one row",
        f"{_PLUGIN}/report/table.py",
        "rows[(unnumbered(plan.name), formats, *shape, *launches)].append(plan)",
        "rows[(unnumbered(plan.name), formats)].append(plan)",
        ("tests/report/test_table.py",),
    ),
    Fault(
        "bits per weight leave metadata out",
        f"{_PLUGIN}/plan/layer.py",
        "return 8 * sum(size for _, size in self.resident) / (self.n",
        "return 8 * self.weight_bytes / (self.n",
        ("tests/report/test_table.py",),
    ),
)
