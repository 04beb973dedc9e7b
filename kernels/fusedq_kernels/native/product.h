// One weight times its tokens, in pieces: tokens laid out as the kernel reads them, sums rounded and
// stored.
#pragma once

#include <memory>
#include <new>

#include "kernel.h"

namespace fusedq {
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

constexpr int64_t kTokensAtOnce = 256;
constexpr int64_t kTotalsBytes = 512 << 10;

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

// Features [low, high) of a block that starts at feature `k0` of the weight, 128 of them at `to`.
void gather(const Input& in, const uint16_t* from, int64_t k0, int64_t low, int64_t high,
            uint16_t* to) {
  if (!in.perm)
    std::memcpy(to + low, from + k0 + low, (high - low) * 2);
  else
    for (int64_t i = low; i < high; i++) to[i] = from[in.perm[k0 + i]];
}

// Blocks [first, last) of tokens [start, stop): [block][token][128] in 2 bytes each or fp32, zero
// where the weight is padding.
void arrange(const Input& in, int64_t first, int64_t last, int64_t start, int64_t stop, int bytes,
             char* to) {
  for (int64_t block = first; block < last; block++)
    for (int64_t m = start; m < stop; m++, to += kBlock * bytes) {
      const int64_t k0 = block * kBlock - in.pad;
      const int64_t low = std::max<int64_t>(0, -k0), high = std::min<int64_t>(kBlock, in.k - k0);
      uint16_t values[kBlock];
      auto* row = bytes == 2 ? (uint16_t*)to : values;
      if (low > 0 || high < kBlock) std::memset(row, 0, sizeof(values));
      gather(in, in.token(m), k0, low, high, row);
      if (bytes == 2) continue;
      for (int i = 0; i < kBlock; i += kLanes) {
        typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
        const Words bits = __builtin_convertvector(load<Halves>(row + i), Words);
        store((float*)to + i, from_16(bits, in.half));
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

// Up to so many tokens the weight is decoded in registers.
int64_t few_tokens(const Kernel& kernel, const Groups& groups) {
  const int share = share_of(groups);
  return share == 16 ? kernel.few_tokens : share >= 4 ? std::min(2, kernel.few_tokens) : 0;
}

// A weight and its tokens, in pieces that threads take in any order: each output is of one.
struct Product {
  Kernel kernel;
  Weight weight;
  Input in;
  int64_t tokens;
  Output out;
  bool is_few;
  int64_t at_once, token_parts, width, output_parts;
  Tokens whole{};

  // Outputs are cut into a multiple of `shares` parts, as far as there are as many.
  Product(const Kernel& kernel, const Weight& weight, const Input& in, int64_t tokens,
          const Output& out, int64_t shares)
      : kernel(kernel), weight(weight), in(in), tokens(tokens), out(out) {
    is_few = tokens <= few_tokens(kernel, weight.groups);
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
    const bool as_is = kernel.activation_bytes == 2 && in_line && !in.perm && !in.pad &&
                       in.k == weight.blocks * kBlock;
    return is_few && !as_is ? weight.blocks * tokens * kBlock * kernel.activation_bytes : 0;
  }
  void arrange_few(char* memory) {
    if (!is_few) return;
    if (arranged_bytes()) {
      arrange(in, 0, weight.blocks, 0, tokens, kernel.activation_bytes, memory);
      whole = {memory, tokens * kBlock, kBlock, (int)tokens};
    } else {
      whole = {in.token(0), kBlock, in.stride, (int)tokens};
    }
  }

  // Writes tokens [start, start + count) of the outputs of the part that it returns.
  struct Written {
    int64_t start, count, first, last;
  };
  Written piece(int64_t index, const Tables& tables) const {
    const int64_t outputs = width * kStrip, parts = weight.groups.parts();
    const int64_t spread_width = is_few ? outputs : kStrip;
    const int64_t spread_rows = is_few ? parts : parts * kPanelBlocks;
    const size_t totals_bytes = at_once * outputs * 4,
                 spread_bytes = spread_rows * spread_width * 4;
    const size_t x_bytes = is_few ? 0 : at_once * kPanelBlocks * kBlock * kernel.activation_bytes;
    char* held = scratch<1>(totals_bytes + 2 * spread_bytes + x_bytes + kernel.panel_bytes);
    char* panel = held;
    held += kernel.panel_bytes;
    char* xs = held;
    held += x_bytes;
    float* totals = (float*)held;
    held += totals_bytes;
    const Spread spread{(float*)held, (int32_t*)(held + spread_bytes), spread_width};
    const int64_t start = index / output_parts * at_once, count = std::min(at_once, tokens - start);
    const int64_t first = index % output_parts * outputs;
    const Part part{first, std::min(first + outputs, weight.n_padded), totals, outputs};
    std::memset(totals, 0, totals_bytes);
    if (is_few) {
      kernel.few(weight, whole, part, tables, spread);
    } else {
      for (int64_t block = 0; block < weight.blocks; block += kPanelBlocks) {
        const int64_t last = std::min<int64_t>(block + kPanelBlocks, weight.blocks);
        arrange(in, block, last, start, start + count, kernel.activation_bytes, xs);
        const Tokens tokens_here{xs, count * kBlock, kBlock, (int)count};
        kernel.many(weight, block, (int)(last - block), tokens_here, part, tables, spread, panel);
      }
    }
    finish(out, part, start, count);
    return {start, count, part.first, std::min(part.last, out.n)};
  }
};

}  // namespace
}  // namespace fusedq
