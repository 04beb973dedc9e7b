// How a word of a tiled layout becomes the weights of 16 outputs, and how they are multiplied.
// Weights are decoded exactly: an integer less its zero point, an entry of the codebook, or a float.
#pragma once

#include "kernel.h"

namespace fusedq {

// The codes that are decoded alike, but for the table.
constexpr Codes alike(Codes codes) {
#if defined(__AVX512F__)
  if (codes == Codes::kFloatE2M1) return Codes::kInt4;
#endif
  return codes;
}

// The number that a code is.
inline float e2m1(int code) {
  const int exponent = code >> 1 & 3, mantissa = code & 1;
  const float size = exponent ? (2 + mantissa) * 0.25f * (1 << exponent) : mantissa * 0.5f;
  return code & 8 ? -size : size;
}

// fp32 products: what every machine has, and exact for activations of 16 bits.
struct Fp32 {
  // Up to so many tokens the weight is decoded in registers; so many share what the first-level
  // cache has of it. Both as the registers allow.
#if defined(__AVX512F__)
  static constexpr int kFewTokens = 4, kTileTokens = 8;
#elif defined(__AVX2__)
  static constexpr int kFewTokens = 2, kTileTokens = 2;
#else
  static constexpr int kFewTokens = 1, kTileTokens = 2;
#endif
  using Activation = float;
  struct Pair {
    Floats even, odd;
  };
  struct Tables {
    Floats entries;
  };

  static Tables tables(Codes codes, const float* codebook) {
    Tables tables;
    for (int i = 0; i < 16; i++)
      tables.entries[i] = codes == Codes::kCodebook4   ? codebook[i]
                          : codes == Codes::kFloatE2M1 ? e2m1(i)
                                                       : i - 8;
    return tables;
  }
  static constexpr ZeroAs zero_as(Codes codes) {
    return reads_zeros(codes) ? ZeroAs::kFloat : ZeroAs::kNone;
  }

  template <Codes codes>
  static FUSEDQ_INLINE Pair decode(Words word, int plane, Words zeros, const Tables& tables) {
    const Floats zero = (Floats)zeros;
    if constexpr (codes == Codes::kCodebook4) {
      return {lookup(tables.entries, (Words)((Bits)word >> 8 * plane)),
              lookup(tables.entries, (Words)((Bits)word >> (8 * plane + 4)))};
    } else if constexpr (codes == Codes::kInt8) {
      return {integer<8>(word, 8 * plane) - zero, integer<8>(word, 8 * plane + 16) - zero};
    } else if constexpr (codes == Codes::kFloatE4M3) {
      return {e4m3((Bits)word << (24 - 8 * plane)), e4m3((Bits)word << (8 - 8 * plane))};
    } else if constexpr (codes == Codes::kInt4Zeros) {
      return {integer<4>(word, 4 * plane) - zero, integer<4>(word, 4 * plane + 16) - zero};
    } else {
#if !defined(__AVX512F__)
      if constexpr (codes == Codes::kInt4)
        return {integer<4>(word, 4 * plane) - 8.0f, integer<4>(word, 4 * plane + 16) - 8.0f};
#endif
      return {lookup(tables.entries, (Words)((Bits)word >> 4 * plane)),
              lookup(tables.entries, (Words)((Bits)word >> (4 * plane + 16)))};
    }
  }

  static FUSEDQ_INLINE Floats dot(Pair weights, const float* x, Floats sum) {
    return multiply_add(weights.odd, splat(x[1]), multiply_add(weights.even, splat(x[0]), sum));
  }

 private:
  // Of the uppermost byte. Below the smallest exponent the implied one of f is taken away again,
  // and only there is the result the smaller one.
  static FUSEDQ_INLINE Floats e4m3(Bits code) {
    const Floats f = (Floats)((code >> 4 & 0x07F00000) + (120 << 23));
    const Floats below = multiply_add(f, splat(2.0f), splat(-0x1p-6f));
    return (Floats)((Bits)lesser(f, below) | (code & 0x80000000));
  }

  template <int bits>
  static FUSEDQ_INLINE Floats integer(Words word, int shift) {
    return __builtin_convertvector((Words)((Bits)word >> shift) & ((1 << bits) - 1), Floats);
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define FUSEDQ_BF16
// bf16 products, two at a time and summed in fp32 (VDPBF16PS): for bf16 activations.
struct Bf16 {
  static constexpr int kFewTokens = 8, kTileTokens = 8;
  using Activation = uint16_t;
  using Pair = Words;
  struct Tables {
    __m512i entries;
    __m512i windows[4];
  };

  static Tables tables(Codes codes, const float* codebook) {
    Tables tables;
    uint16_t entries[32];
    uint8_t windows[64];
    for (int i = 0; i < 32; i++) {
      // Zero points: the index is code + 16 - zero, below 32. E4M3: the subnormal numbers.
      const float value = codes == Codes::kCodebook4   ? codebook[i & 15]
                          : codes == Codes::kInt4Zeros ? i - 16.0f
                          : codes == Codes::kFloatE4M3 ? i * 0x1p-9f
                          : codes == Codes::kFloatE2M1 ? e2m1(i & 15)
                                                       : (i & 15) - 8.0f;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      entries[i] = (uint16_t)(bits >> 16);
    }
    tables.entries = _mm512_loadu_si512(entries);
    for (int plane = 0; plane < 4; plane++) {
      for (int i = 0; i < 64; i++) windows[i] = 8 * plane + (i & 4 ? 32 : 0) + (i & 2 ? 4 : 0);
      tables.windows[plane] = _mm512_loadu_si512(windows);
    }
    return tables;
  }
  static constexpr ZeroAs zero_as(Codes codes) {
    if (!reads_zeros(codes)) return ZeroAs::kNone;
    return codes == Codes::kInt8 ? ZeroAs::kMagic : ZeroAs::kIndex;
  }

  // An index of the table is the lowest 5 bits of a 16-bit lane.
  template <Codes codes>
  static FUSEDQ_INLINE Pair decode(Words word, int plane, Words zeros, const Tables& tables) {
    const __m512i t = (__m512i)word;
    if constexpr (codes == Codes::kInt8) {
      return bytes((__m512i)((Bits)word >> 8 * plane), (__m512i)((Bits)word >> (8 * plane + 16)),
                   zeros);
    } else if constexpr (codes == Codes::kFloatE4M3) {
      return plane == 0 ? e4m3(_mm512_slli_epi16(t, 8), t, tables)
                        : e4m3(t, _mm512_srli_epi16(t, 8), tables);
    } else if constexpr (codes == Codes::kCodebook4) {
      const __m512i index = _mm512_multishift_epi64_epi8(tables.windows[plane], t);
      return (Words)_mm512_permutexvar_epi16(index, tables.entries);
    } else if constexpr (codes == Codes::kInt4Zeros) {
      const __m512i code =
          _mm512_and_si512((__m512i)((Bits)word >> 4 * plane), _mm512_set1_epi32(0x000F000F));
      const __m512i index = _mm512_add_epi16(code, (__m512i)zeros);
      return (Words)_mm512_permutexvar_epi16(index, tables.entries);
    } else {
      return (Words)_mm512_permutexvar_epi16((__m512i)((Bits)word >> 4 * plane), tables.entries);
    }
  }

  static FUSEDQ_INLINE Floats dot(Pair weights, const uint16_t* x, Floats sum) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)weights,
                                    (__m512bh)_mm512_set1_epi32(pair));
  }

 private:
  // Of the upper byte of each half, which is the lower one of `code`. The products take subnormal
  // bf16 for zero: those are looked up by the mantissa.
  static FUSEDQ_INLINE Pair e4m3(__m512i upper, __m512i code, const Tables& tables) {
    const __m512i sign = _mm512_set1_epi16((int16_t)0x8000);
    const __m512i size = _mm512_and_si512(_mm512_srli_epi16(upper, 4), _mm512_set1_epi16(0x07F0));
    const __mmask32 below = _mm512_testn_epi16_mask(upper, _mm512_set1_epi16(0x7800));
    const __m512i normal = _mm512_add_epi16(size, _mm512_set1_epi16(120 << 7));
    const __m512i value = _mm512_mask_permutexvar_epi16(normal, below, code, tables.entries);
    return (Words)_mm512_ternarylogic_epi32(upper, sign, value, 0xEA);
  }

  // The lowest byte of each, less its zero point: at most 8 significant bits, a whole bf16.
  static FUSEDQ_INLINE Pair bytes(__m512i even, __m512i odd, Words zeros) {
    const __m512i mask = _mm512_set1_epi32(0xFF), magic = (__m512i)splat(kMagic);
    const __m512 zero = (__m512)(Floats)zeros;
    even = _mm512_ternarylogic_epi32(even, mask, magic, 0xEA);
    odd = _mm512_ternarylogic_epi32(odd, mask, magic, 0xEA);
    const __m512i low = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(even), zero));
    const __m512i high = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(odd), zero));
    return (Words)_mm512_mask_mov_epi16(high, 0x55555555, _mm512_srli_epi32(low, 16));
  }
};
#endif

}  // namespace fusedq
