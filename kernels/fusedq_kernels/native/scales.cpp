#include "scales.h"

namespace fusedq {
namespace {

// Elements `which`, `which + 2`, ... of a and b.
template <int which>
Words every_other(Words a, Words b) {
  constexpr int w = which;
  return __builtin_shufflevector(a, b, w, w + 2, w + 4, w + 6, w + 8, w + 10, w + 12, w + 14,
                                 w + 16, w + 18, w + 20, w + 22, w + 24, w + 26, w + 28, w + 30);
}

// Words `element`, `element + vector`, ... from `from` on, 16 of them.
Words strided(const int32_t* from, int vector, int element) {
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

Words zero_operand(ZeroAs zero_as, Floats zeros) {
  if (zero_as == ZeroAs::kFloat) return (Words)zeros;
  if (zero_as == ZeroAs::kMagic) return (Words)(zeros + kMagic);
  const Words index = 16 - __builtin_convertvector(zeros, Words);
  return index | index << 16;
}

}  // namespace

void spread_scales(const Scales& scales, const Groups& groups, int64_t block, int64_t first,
                   int64_t last, ZeroAs zero_as, const Spread& to) {
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
      if (zero_as == ZeroAs::kNone) continue;
      for (int unit = 0; unit < 2; unit++)
        store(to.zeros + part * to.stride + (n - first) + unit * kLanes,
              zero_operand(zero_as, zeros[unit]));
    }
  }
}

}  // namespace fusedq
