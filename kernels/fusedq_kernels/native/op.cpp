// torch.ops.fusedq_cpu: the operator, through PyTorch's stable interface for C++.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "gemm.h"

namespace fusedq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// A thread keeps its scratch from call to call.
template <int slot>
char* scratch(size_t bytes) {
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  static thread_local std::unique_ptr<char[], Free> held;
  static thread_local size_t size = 0;
  if (bytes > size) {
    held.reset();
    size = 0;
    held.reset(static_cast<char*>(::operator new[](bytes, std::align_val_t{64})));
    size = bytes;
  }
  return held.get();
}

constexpr int64_t kTokensAtOnce = 128;
constexpr int64_t kTotalsBytes = 768 << 10;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Activations in memory.
struct Input {
  const uint16_t* x;
  int64_t stride;
  bool half;
  const int32_t* perm;  // row k of the weight reads feature perm[k], or none
  int64_t k, pad;
};

inline float to_float(uint16_t bits, bool half) {
  float value;
  uint32_t word = (uint32_t)bits << 16;
  if (half) {
    const Floats converted = from_half(splat((int32_t)bits));
    return converted[0];
  }
  std::memcpy(&value, &word, 4);
  return value;
}

// Blocks [first, last) of tokens [start, stop): [block][token][128], zero where the weight is
// padding.
template <typename Activation>
void arrange(const Input& in, int64_t first, int64_t last, int64_t start, int64_t stop,
             Activation* to) {
  const int64_t tokens = stop - start;
  for (int64_t block = first; block < last; block++)
    for (int64_t m = 0; m < tokens; m++) {
      Activation* row = to + ((block - first) * tokens + m) * kBlock;
      const uint16_t* from = in.x + (start + m) * in.stride;
      const int64_t k0 = block * kBlock - in.pad;
      const int64_t low = std::max<int64_t>(0, -k0), high = std::min<int64_t>(kBlock, in.k - k0);
      if (low > 0 || high < kBlock) std::memset(row, 0, kBlock * sizeof(Activation));
      if constexpr (sizeof(Activation) == 2) {
        if (!in.perm)
          std::memcpy(row + low, from + k0 + low, (high - low) * 2);
        else
          for (int64_t i = low; i < high; i++) row[i] = from[in.perm[k0 + i]];
      } else {
        uint16_t values[kBlock] = {};
        if (!in.perm)
          std::memcpy(values + low, from + k0 + low, (high - low) * 2);
        else
          for (int64_t i = low; i < high; i++) values[i] = from[in.perm[k0 + i]];
        for (int i = 0; i < kBlock; i += kLanes) {
          typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
          const Words bits = __builtin_convertvector(load<Halves>(values + i), Words);
          store(row + i, from_16(bits, in.half));
        }
      }
    }
}

#if defined(__x86_64__)
using Half = _Float16;
#else
using Half = __fp16;  // GCC 12 has the other one in C alone
#endif

inline Words to_16(Floats value, bool half) {
  if (!half) {
    const Bits bits = (Bits)value;
    const Bits rounded = bits + 0x7FFF + (bits >> 16 & 1);
    return (Words)(value != value ? (bits | 0x400000) >> 16 : rounded >> 16);
  }
  Words result;
  for (int lane = 0; lane < kLanes; lane++) {
    const Half each = (Half)value[lane];
    uint16_t bits;
    std::memcpy(&bits, &each, 2);
    result[lane] = bits;
  }
  return result;
}

struct Output {
  uint16_t* y;
  int64_t n;
  bool half;
  const uint16_t* bias;
};

void finish(const Output& out, const Part& part, int64_t start, int64_t tokens) {
  const int64_t count = std::min(part.last, out.n) - part.first;
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t n = 0; n < count; n += kLanes) {
      typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
      const int64_t lanes = std::min<int64_t>(kLanes, count - n);
      Floats value = load<Floats>(part.totals + m * part.stride + n);
      if (out.bias) {
        Halves bias = {};
        std::memcpy(&bias, out.bias + part.first + n, 2 * lanes);
        value += from_16(__builtin_convertvector(bias, Words), out.half);
      }
      const Halves rounded = __builtin_convertvector(to_16(value, out.half), Halves);
      std::memcpy(out.y + (start + m) * out.n + part.first + n, &rounded, 2 * lanes);
    }
}

// Words of a run that share a scale: a run has 16 for 32 features.
int share_of(const Groups& groups) { return std::min(groups.step, kRun) / 2; }

// Up to so many tokens the weight is decoded in registers.
template <typename Machine>
int64_t few_tokens(const Groups& groups) {
  const int share = share_of(groups);
  return share == 16 ? Machine::kFewTokens : share >= 4 ? std::min(2, Machine::kFewTokens) : 0;
}

template <typename Machine, Codes codes>
void run_few(const Weight& weight, const Tokens<typename Machine::Activation>& x, const Part& part,
             const typename Machine::Tables& tables, const Spread& spread) {
  const auto go = [&]<int share, int... m>(std::integer_sequence<int, m...>) {
    ((x.count == m + 1 ? few<Machine, codes, m + 1, share>(weight, x, part, tables, spread)
                       : void()),
     ...);
  };
  constexpr auto all = std::make_integer_sequence<int, Machine::kFewTokens>{};
  constexpr auto two = std::make_integer_sequence<int, std::min(2, Machine::kFewTokens)>{};
  switch (share_of(weight.groups)) {
    case 4:
      return go.template operator()<4>(two);
    case 8:
      return go.template operator()<8>(two);
    default:
      return go.template operator()<16>(all);
  }
}

template <typename Machine, Codes codes>
void run(const Weight& weight, const Input& in, int64_t tokens, const Output& out,
         const float* codebook) {
  using Activation = typename Machine::Activation;
  const auto tables = Machine::tables(codes, codebook);
  const bool is_few = tokens <= few_tokens<Machine>(weight.groups);
  const int64_t at_once = std::min<int64_t>(tokens, kTokensAtOnce);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t strips = weight.n_padded / kStrip;
  const int64_t most =
      std::max<int64_t>(1, (is_few ? 16 << 10 : kTotalsBytes) / (4 * at_once * kStrip));
  const int64_t token_parts = divide_up(tokens, at_once);
  const int64_t wanted = divide_up(divide_up(strips, most), threads) * threads;
  const int64_t width = divide_up(strips, wanted), output_parts = divide_up(strips, width);

  Tokens<Activation> whole{nullptr, 0, 0, (int)tokens};
  if (is_few) {
    const bool as_is =
        sizeof(Activation) == 2 && !in.perm && !in.pad && in.k == weight.blocks * kBlock;
    if (as_is) {
      whole.x = (const Activation*)in.x, whole.block_stride = kBlock,
      whole.token_stride = in.stride;
    } else {
      auto* to = (Activation*)scratch<0>(weight.blocks * tokens * kBlock * sizeof(Activation));
      arrange(in, 0, weight.blocks, 0, tokens, to);
      whole.x = to, whole.block_stride = tokens * kBlock, whole.token_stride = kBlock;
    }
  }
  torch::stable::parallel_for(0, token_parts * output_parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t outputs = width * kStrip, parts = weight.groups.parts();
    const int64_t spread_width = is_few ? outputs : kStrip;
    const int64_t spread_rows = is_few ? parts : parts * kPanelBlocks;
    const size_t totals_bytes = at_once * outputs * 4,
                 spread_bytes = spread_rows * spread_width * 4;
    const size_t x_bytes = is_few ? 0 : at_once * kPanelBlocks * kBlock * sizeof(Activation);
    char* held = scratch<1>(totals_bytes + 2 * spread_bytes + x_bytes + sizeof(Panel<Machine>));
    auto* panel = (Panel<Machine>*)held;
    held += sizeof(Panel<Machine>);
    auto* xs = (Activation*)held;
    held += x_bytes;
    float* totals = (float*)held;
    held += totals_bytes;
    const Spread spread{(float*)held, (int32_t*)(held + spread_bytes), spread_width};
    for (int64_t index = begin; index < end; index++) {
      const int64_t start = index / output_parts * at_once,
                    count = std::min(at_once, tokens - start);
      const int64_t first = index % output_parts * outputs;
      const Part part{first, std::min(first + outputs, weight.n_padded), totals, outputs};
      std::memset(totals, 0, totals_bytes);
      if (is_few) {
        run_few<Machine, codes>(weight, whole, part, tables, spread);
      } else {
        for (int64_t block = 0; block < weight.blocks; block += kPanelBlocks) {
          const int64_t last = std::min<int64_t>(block + kPanelBlocks, weight.blocks);
          arrange(in, block, last, start, start + count, xs);
          const Tokens<Activation> tokens_here{xs, count * kBlock, kBlock, (int)count};
          many<Machine, codes>(weight, block, (int)(last - block), tokens_here, part, tables,
                               spread, *panel);
        }
      }
      finish(out, part, start, count);
    }
  });
}

template <typename Machine>
void run_codes(Codes codes, const Weight& weight, const Input& in, int64_t tokens,
               const Output& out, const float* codebook) {
  switch (codes) {
    case Codes::kInt4:
      return run<Machine, Codes::kInt4>(weight, in, tokens, out, codebook);
    case Codes::kInt4Zeros:
      return run<Machine, Codes::kInt4Zeros>(weight, in, tokens, out, codebook);
    case Codes::kCodebook4:
      return run<Machine, Codes::kCodebook4>(weight, in, tokens, out, codebook);
    case Codes::kInt8:
      return run<Machine, Codes::kInt8>(weight, in, tokens, out, codebook);
    case Codes::kFloatE4M3:
      return run<Machine, Codes::kFloatE4M3>(weight, in, tokens, out, codebook);
  }
}

}  // namespace

// numbers: codes, zero point, K, group size, step, pad, offset, last group, kind of scales, whether
// they are fp16 (../cpu/fused.py). Operands have been checked there.
void matmul_out(Tensor out, const Tensor& x, const Tensor& qweight, const Tensor& scales,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& perm,
                std::vector<int64_t> numbers, std::vector<double> codebook) {
  enum { kCodes, kZero, kFeatures, kGroupSize, kStep, kPad, kOffset, kLastGroup, kKind, kHalf };
  const int64_t tokens = x.size(0);
  if (tokens == 0) return;
  const bool half = x.scalar_type() == ScalarType::Half;
  Weight weight;
  weight.words = (const int32_t*)qweight.const_data_ptr();
  weight.blocks = qweight.size(0), weight.n_padded = qweight.size(1);
  weight.scales = {(const int32_t*)scales.const_data_ptr(),
                   scales.stride(0),
                   (ScaleKind)numbers[kKind],
                   numbers[kHalf] != 0,
                   (int)scales.size(2),
                   (float)numbers[kZero]};
  weight.groups = {numbers[kGroupSize], numbers[kOffset], numbers[kLastGroup], (int)numbers[kStep]};
  const Input in{(const uint16_t*)x.const_data_ptr(),
                 x.stride(0),
                 half,
                 perm ? (const int32_t*)perm->const_data_ptr() : nullptr,
                 numbers[kFeatures],
                 numbers[kPad]};
  const Output to{(uint16_t*)out.mutable_data_ptr(), out.size(1), half,
                  bias ? (const uint16_t*)bias->const_data_ptr() : nullptr};
  float table[16] = {};
  for (size_t i = 0; i < std::min<size_t>(16, codebook.size()); i++) table[i] = (float)codebook[i];
  const Codes codes = (Codes)numbers[kCodes];
#if defined(FUSEDQ_BF16)
  // The codebook is in the dtype of the activations
  if (!half) return run_codes<Bf16>(codes, weight, in, tokens, to, table);
#endif
  run_codes<Fp32>(codes, weight, in, tokens, to, table);
}

}  // namespace fusedq

STABLE_TORCH_LIBRARY_FRAGMENT(fusedq_cpu, m) {
  m.def(FUSEDQ_ISA
        "(Tensor(a!) out, Tensor x, Tensor qweight, Tensor scales, Tensor? bias, Tensor? perm,"
        " int[] numbers, float[] codebook) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fusedq_cpu, CPU, m) {
  m.impl(FUSEDQ_ISA, TORCH_BOX(&fusedq::matmul_out));
}
