// torch.ops.fusedq_cpu: the operator, through PyTorch's stable interface for C++.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "product.h"

namespace fusedq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Kernel kernel_for(Codes codes, bool half) {
  switch (codes) {
    case Codes::kInt4:
      return kernel_of<Codes::kInt4>(half);
    case Codes::kInt4Zeros:
      return kernel_of<Codes::kInt4Zeros>(half);
    case Codes::kCodebook4:
      return kernel_of<Codes::kCodebook4>(half);
    case Codes::kInt8:
      return kernel_of<Codes::kInt8>(half);
    case Codes::kFloatE4M3:
      return kernel_of<Codes::kFloatE4M3>(half);
    default:
      return kernel_of<Codes::kFloatE2M1>(half);
  }
}

void run(const Kernel& kernel, const Weight& weight, const Input& in, int64_t tokens,
         const Output& out, const float* codebook) {
  Tables tables;
  kernel.fill(codebook, tables);
  Product product(kernel, weight, in, tokens, out, torch::stable::get_num_threads());
  product.arrange_few(scratch<0>(product.arranged_bytes()));
  torch::stable::parallel_for(0, product.pieces(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; index++) product.piece(index, tables);
  });
}

// What an operator is told of a weight beside its tensors (../cpu/fused.py has the numbers' order):
// codes, zero point, K, group size, step, pad, offset, last group, kind of scales, whether they are
// fp16, the vector with which scales of rows begin or -1.
struct Described {
  enum {
    kCodes, kZero, kFeatures, kGroupSize, kStep, kPad, kOffset, kLastGroup, kKind, kHalf, kRows
  };
  const std::vector<int64_t>& numbers;
  float table[16] = {};

  Described(const std::vector<int64_t>& numbers, const std::vector<double>& codebook)
      : numbers(numbers) {
    for (size_t i = 0; i < std::min<size_t>(16, codebook.size()); i++)
      table[i] = (float)codebook[i];
  }

  Codes codes() const { return (Codes)numbers[kCodes]; }

  const float* row_scales(const Weight& weight) const {
    const int64_t vectors = numbers[kRows];
    if (vectors < 0) return nullptr;
    return (const float*)weight.scales.at(vectors * weight.scales.vector, 0);
  }

  // A weight, or expert `place` of a stack, whose tensors have one dimension more.
  Weight weight(const Tensor& qweight, const Tensor& scales, int64_t place = 0) const {
    const int64_t stacked = qweight.dim() - 3;
    const auto* words = (const int32_t*)qweight.const_data_ptr();
    const auto* of_scales = (const int32_t*)scales.const_data_ptr();
    if (stacked) words += place * qweight.stride(0), of_scales += place * scales.stride(0);
    return {words,
            qweight.size(stacked),
            qweight.size(stacked + 1),
            {of_scales, scales.stride(stacked), (ScaleKind)numbers[kKind], numbers[kHalf] != 0,
             (int)scales.size(stacked + 2), (float)numbers[kZero]},
            {numbers[kGroupSize], numbers[kOffset], numbers[kLastGroup], (int)numbers[kStep]}};
  }
};

}  // namespace

// Operands have been checked in ../cpu/fused.py.
void matmul_out(Tensor out, const Tensor& x, const Tensor& qweight, const Tensor& scales,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& perm,
                std::vector<int64_t> numbers, std::vector<double> codebook) {
  const int64_t tokens = x.size(0);
  if (tokens == 0) return;
  const bool half = x.scalar_type() == ScalarType::Half;
  const Described told(numbers, codebook);
  const Weight weight = told.weight(qweight, scales);
  const Input in{(const uint16_t*)x.const_data_ptr(),
                 x.stride(0),
                 half,
                 perm ? (const int32_t*)perm->const_data_ptr() : nullptr,
                 numbers[Described::kFeatures],
                 numbers[Described::kPad]};
  const Output to{(uint16_t*)out.mutable_data_ptr(), out.size(1), half, told.row_scales(weight),
                  bias ? (const uint16_t*)bias->const_data_ptr() : nullptr};
  run(kernel_for(told.codes(), half), weight, in, tokens, to, told.table);
}

}  // namespace fusedq

#include "experts.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fusedq_cpu, m) {
  m.def(FUSEDQ_ISA
        "(Tensor(a!) out, Tensor x, Tensor qweight, Tensor scales, Tensor? bias, Tensor? perm,"
        " int[] numbers, float[] codebook) -> ()");
  m.def(FUSEDQ_ISA
        "_experts(Tensor(a!) out, Tensor x, Tensor topk_weights, Tensor topk_ids,"
        " Tensor? expert_map, Tensor w13_qweight, Tensor w13_scales, Tensor? w13_bias,"
        " Tensor? w13_perm, Tensor w2_qweight, Tensor w2_scales, Tensor? w2_bias,"
        " Tensor? w2_perm, int[] numbers, float[] codebooks, int inner, int activation,"
        " float[] constants) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fusedq_cpu, CPU, m) {
  m.impl(FUSEDQ_ISA, TORCH_BOX(&fusedq::matmul_out));
  m.impl(FUSEDQ_ISA "_experts", TORCH_BOX(&fusedq::experts_out));
}
