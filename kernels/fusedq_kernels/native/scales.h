// Scales and zero points of the tiled layouts (../layouts/scales.py), spread to one fp32 an
// output for the K block at hand.
#pragma once

#include <algorithm>

#include "decode.h"

namespace fusedq {

// Where the groups fall in a K block (../geometry.py): aligned parts of `step` features share one.
struct Groups {
  int64_t size, offset, last;
  int step;

  int parts() const { return kBlock / step; }
  int64_t at(int64_t block, int part) const {
    return std::min((block * kBlock + part * step + offset) / size, last);
  }
};

enum class ScaleKind { kFloat, kPairs, kBesideZeros };

struct Scales {
  const int32_t* words;  // [vectors, n_padded / rows, vector]
  int64_t stride;        // words of a vector of all outputs
  ScaleKind kind;
  bool half;  // 16-bit ones are fp16, else bf16
  int vector;
  float zero;  // of all groups, where none is stored

  int64_t row_bytes() const { return (kind == ScaleKind::kPairs ? 2 : 4) * vector; }
  const char* at(int64_t group, int64_t n) const {
    return (const char*)(words + group / vector * stride) + n * row_bytes();
  }
};

// Outputs that are spread at a time: those of two units share words.
constexpr int kStrip = 2 * kLanes;

// fp32 scales and zero operands `[part][output]`.
struct Spread {
  float* scales;
  int32_t* zeros;
  int64_t stride;
};

// Exact, subnormal numbers included, whatever the machine does with those of fp32.
inline Floats from_half(Words bits) {
  const Words magnitude = (bits & 0x7FFF) << 13, exponent = magnitude & 0x0F800000;
  const Words normal = magnitude + (112 << 23);
  const Floats subnormal = (Floats)(magnitude + (113 << 23)) - 0x1p-14f;
  const Words finite = exponent == 0 ? (Words)subnormal : normal;
  const Words value = exponent == 0x0F800000 ? magnitude | 0x7F800000 : finite;
  return (Floats)(value | (bits & 0x8000) << 16);
}

inline Floats from_16(Words bits, bool half) {
  return half ? from_half(bits) : (Floats)(bits << 16);
}

// Elements `which`, `which + 2`, ... of a and b.
template <int which>
inline Words every_other(Words a, Words b) {
  constexpr int w = which;
  return __builtin_shufflevector(a, b, w, w + 2, w + 4, w + 6, w + 8, w + 10, w + 12, w + 14,
                                 w + 16, w + 18, w + 20, w + 22, w + 24, w + 26, w + 28, w + 30);
}

// Words `element`, `element + vector`, ... from `from` on, 16 of them.
inline Words strided(const int32_t* from, int vector, int element) {
  if (vector == 1) return load<Words>(from);
  const bool odd = element & 1;
  const auto halved = [odd](const int32_t* at) {
    const Words a = load<Words>(at), b = load<Words>(at + 16);
    return odd ? every_other<1>(a, b) : every_other<0>(a, b);
  };
  if (vector == 2) return halved(from);
  const Words a = halved(from), b = halved(from + 32);
  return element & 2 ? every_other<1>(a, b) : every_other<0>(a, b);
}

// Outputs [first, last), multiples of kStrip, of a block.
template <typename Machine, Codes codes>
inline void spread_scales(const Scales& scales, const Groups& groups, int64_t block, int64_t first,
                          int64_t last, const Spread& to) {
  for (int part = 0; part < groups.parts(); part++) {
    const int64_t group = groups.at(block, part);
    const int element = group % scales.vector;
    const int32_t* words = scales.words + group / scales.vector * scales.stride;
    for (int64_t n = first; n < last; n += kStrip) {
      float* into = to.scales + part * to.stride + (n - first);
      Floats zeros[2] = {splat(scales.zero), splat(scales.zero)};
      if (scales.kind == ScaleKind::kPairs) {
        const Words pairs = strided(words + n / 2 * scales.vector, scales.vector, element);
        const Floats low = from_16(pairs & 0xFFFF, scales.half);
        const Floats high = from_16((Words)((Bits)pairs >> 16), scales.half);
        store(into, __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20,
                                            21, 22, 23));
        store(into + kLanes, __builtin_shufflevector(low, high, 8, 9, 10, 11, 12, 13, 14, 15, 24,
                                                     25, 26, 27, 28, 29, 30, 31));
      } else {
        for (int unit = 0; unit < 2; unit++) {
          const int64_t row = n + unit * kLanes;
          const Words each = strided(words + row * scales.vector, scales.vector, element);
          if (scales.kind == ScaleKind::kFloat) {
            store(into + unit * kLanes, each);
            continue;
          }
          store(into + unit * kLanes, from_16((Words)((Bits)each >> 16), scales.half));
          zeros[unit] = __builtin_convertvector(each & 0xFFFF, Floats);
        }
      }
      if (reads_zeros(codes))
        for (int unit = 0; unit < 2; unit++)
          store(to.zeros + part * to.stride + (n - first) + unit * kLanes,
                Machine::zero_operand(codes, zeros[unit]));
    }
  }
}

}  // namespace fusedq
