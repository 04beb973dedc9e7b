// Scales and zero points of the tiled layouts (../layouts/scales.py), spread to one fp32 an
// output for the K block at hand.
#pragma once

#include <algorithm>

#include "codes.h"
#include "lanes.h"

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

// Words of a run that share a scale: a run has 16 for 32 features.
inline int share_of(const Groups& groups) { return std::min(groups.step, kRun) / 2; }

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

// What a decoder takes for a zero point: itself, the sum with kMagic (an integer's bits are then the
// lowest of the fp32), or 16 less it, in both halves.
enum class ZeroAs { kNone, kFloat, kMagic, kIndex };
constexpr float kMagic = 8388608.0f;

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

// Outputs [first, last), multiples of kStrip, of a block.
void spread_scales(const Scales& scales, const Groups& groups, int64_t block, int64_t first,
                   int64_t last, ZeroAs zero_as, const Spread& to);

}  // namespace fusedq
