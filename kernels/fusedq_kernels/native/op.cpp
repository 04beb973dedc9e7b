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
  const int32_t* rows = nullptr;  // token m is row rows[m], or row m

  const uint16_t* token(int64_t m) const { return x + (rows ? rows[m] : m) * stride; }
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
      const uint16_t* from = in.token(start + m);
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
  const float* row_scales;  // of all outputs, padding too, or none
  const uint16_t* bias;
};

void finish(const Output& out, const Part& part, int64_t start, int64_t tokens) {
  const int64_t count = std::min(part.last, out.n) - part.first;
  for (int64_t m = 0; m < tokens; m++)
    for (int64_t n = 0; n < count; n += kLanes) {
      typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
      const int64_t lanes = std::min<int64_t>(kLanes, count - n);
      Floats value = load<Floats>(part.totals + m * part.stride + n);
      if (out.row_scales) value *= load<Floats>(out.row_scales + part.first + n);
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

// A weight and its tokens, in pieces that threads take in any order: each output is of one.
template <typename Machine, Codes codes>
struct Product {
  using Activation = typename Machine::Activation;

  Weight weight;
  Input in;
  int64_t tokens;
  Output out;
  bool is_few;
  int64_t at_once, token_parts, width, output_parts;
  Tokens<Activation> whole{};

  // Outputs are cut into a multiple of `shares` parts, as far as there are as many.
  Product(const Weight& weight, const Input& in, int64_t tokens, const Output& out, int64_t shares)
      : weight(weight), in(in), tokens(tokens), out(out) {
    is_few = tokens <= few_tokens<Machine>(weight.groups);
    at_once = std::min<int64_t>(tokens, kTokensAtOnce);
    token_parts = divide_up(tokens, at_once);
    const int64_t strips = weight.n_padded / kStrip;
    const int64_t most =
        std::max<int64_t>(1, (is_few ? 16 << 10 : kTotalsBytes) / (4 * at_once * kStrip));
    width = divide_up(strips, divide_up(divide_up(strips, most), shares) * shares);
    output_parts = divide_up(strips, width);
  }

  int64_t pieces() const { return token_parts * output_parts; }

  // Few tokens are laid out once, before the first piece: in so many bytes, none where they lie so.
  int64_t arranged_bytes() const {
    const bool in_line = tokens == 1 || !in.rows;
    const bool as_is = sizeof(Activation) == 2 && in_line && !in.perm && !in.pad &&
                       in.k == weight.blocks * kBlock;
    return is_few && !as_is ? weight.blocks * tokens * kBlock * (int64_t)sizeof(Activation) : 0;
  }
  void arrange_few(char* memory) {
    if (!is_few) return;
    if (arranged_bytes()) {
      arrange(in, 0, weight.blocks, 0, tokens, (Activation*)memory);
      whole = {(Activation*)memory, tokens * kBlock, kBlock, (int)tokens};
    } else {
      whole = {(const Activation*)in.token(0), kBlock, in.stride, (int)tokens};
    }
  }

  // Writes tokens [start, start + count) of the outputs of the part that it returns.
  struct Written {
    int64_t start, count, first, last;
  };
  __attribute__((noinline)) Written piece(int64_t index,
                                          const typename Machine::Tables& tables) const {
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
    const int64_t start = index / output_parts * at_once, count = std::min(at_once, tokens - start);
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
        many<Machine, codes>(weight, block, (int)(last - block), tokens_here, part, tables, spread,
                             *panel);
      }
    }
    finish(out, part, start, count);
    return {start, count, part.first, std::min(part.last, out.n)};
  }
};

template <typename Machine, Codes codes>
void run(const Weight& weight, const Input& in, int64_t tokens, const Output& out,
         const float* codebook) {
  const auto tables = Machine::tables(codes, codebook);
  Product<Machine, codes> product(weight, in, tokens, out, torch::stable::get_num_threads());
  product.arrange_few(scratch<0>(product.arranged_bytes()));
  torch::stable::parallel_for(0, product.pieces(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; index++) product.piece(index, tables);
  });
}

// `run.operator()<Machine, codes>()` for the machine and codes at hand.
template <typename Machine, typename Run>
void with_codes(Codes codes, const Run& run) {
  switch (codes) {
    case Codes::kInt4:
      return run.template operator()<Machine, Codes::kInt4>();
    case Codes::kInt4Zeros:
      return run.template operator()<Machine, Codes::kInt4Zeros>();
    case Codes::kCodebook4:
      return run.template operator()<Machine, Codes::kCodebook4>();
    case Codes::kInt8:
      return run.template operator()<Machine, Codes::kInt8>();
    case Codes::kFloatE4M3:
      return run.template operator()<Machine, Codes::kFloatE4M3>();
    case Codes::kFloatE2M1:
      return run.template operator()<Machine, Codes::kFloatE2M1>();
  }
}

template <typename Run>
void dispatch(Codes codes, bool half, const Run& run) {
#if defined(FUSEDQ_BF16)
  // The codebook is in the dtype of the activations
  if (!half) return with_codes<Bf16>(codes, run);
#endif
  with_codes<Fp32>(codes, run);
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
  dispatch(told.codes(), half, [&]<typename Machine, Codes codes>() {
    run<Machine, codes>(weight, in, tokens, to, told.table);
  });
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
