// Vectors of 16 lanes, one output feature each: what the kernel needs of an instruction set.
//
// They are the compiler's own vector types, which it lowers to whatever the target has; only where
// one instruction of a set does better than what the compiler finds is it named here.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fusedq {

constexpr int kLanes = 16;

// Part of its caller: its arrays are registers there and its arguments constants.
#define FUSEDQ_INLINE __attribute__((always_inline)) inline

#define FUSEDQ_UNROLL _Pragma("GCC unroll 16")
// Of the words of a run: vectors that are many of the machine's are not kept in its registers anyway.
#if defined(__AVX2__)
#define FUSEDQ_UNROLL_WORDS FUSEDQ_UNROLL
#else
#define FUSEDQ_UNROLL_WORDS _Pragma("GCC unroll 1")
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));

template <typename V, typename T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V, typename T>
inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

inline Floats splat(float value) { return value - Floats{}; }
inline Words splat(int32_t value) { return value - Words{}; }

FUSEDQ_INLINE Floats multiply_add(Floats a, Floats b, Floats sum) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#else
  // contracted, where the target has the instruction (-ffp-contract=fast)
  return a * b + sum;
#endif
}

// Neither is NaN. A comparison is lowered to scalars where vectors are wider than the machine's.
FUSEDQ_INLINE Floats lesser(const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  Floats result;
  for (int half = 0; half < kLanes; half += 8)
    _mm256_storeu_ps((float*)&result + half, _mm256_min_ps(_mm256_loadu_ps((const float*)&a + half),
                                                           _mm256_loadu_ps((const float*)&b + half)));
  return result;
#else
  return a < b ? a : b;
#endif
}

// fp32 of the upper 16 bits, a bf16.
inline Floats from_upper(Words words) { return (Floats)(words & splat((int32_t)0xFFFF0000)); }
inline Floats from_lower(Words words) { return (Floats)((Bits)words << 16); }

// table[index & 15]
FUSEDQ_INLINE Floats lookup(const Floats& table, Words index) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined(__AVX2__)
  Floats result;
  const float* entries = (const float*)&table;
  const __m256 low = _mm256_loadu_ps(entries), high = _mm256_loadu_ps(entries + 8);
  for (int half = 0; half < 2; half++) {
    const __m256i at = _mm256_loadu_si256((const __m256i*)&index + half);
    const __m256 which = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));
    _mm256_storeu_ps((float*)&result + 8 * half,
                     _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at),
                                      _mm256_permutevar8x32_ps(high, at), which));
  }
  return result;
#else
  Floats result;
  for (int lane = 0; lane < kLanes; lane++) result[lane] = table[index[lane] & 15];
  return result;
#endif
}

// 16 rows of 16 words, rows `stride` words apart, by columns.
FUSEDQ_INLINE void transpose(const int32_t* rows, int64_t stride, Words* columns) {
  Words r[16], t[16];
#define FUSEDQ_SHUFFLE __builtin_shufflevector
#if defined(__AVX512F__)
  // GCC finds the permutation of two registers for these, at half the rate of an unpacking
#define FUSEDQ_UNPACK(a, b, lowest, width) \
  (Words) _mm512_unpack##lowest##_epi##width((__m512i)(a), (__m512i)(b))
#endif
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = load<Words>(rows + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
#if defined(__AVX512F__)
    t[i] = FUSEDQ_UNPACK(r[i], r[i + 1], lo, 32);
    t[i + 1] = FUSEDQ_UNPACK(r[i], r[i + 1], hi, 32);
#else
    t[i] = FUSEDQ_SHUFFLE(r[i], r[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    t[i + 1] =
        FUSEDQ_SHUFFLE(r[i], r[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#endif
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const Words a = t[i + j], b = t[i + j + 2];
#if defined(__AVX512F__)
      r[i + 2 * j] = FUSEDQ_UNPACK(a, b, lo, 64);
      r[i + 2 * j + 1] = FUSEDQ_UNPACK(a, b, hi, 64);
#else
      r[i + 2 * j] = FUSEDQ_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      r[i + 2 * j + 1] =
          FUSEDQ_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
#endif
    }
  // r[4 q + c] holds, in its four quarters, columns c, c + 4, c + 8, c + 12 of rows 4 q to 4 q + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const Words a = r[8 * j + i], b = r[8 * j + 4 + i];
      t[8 * j + i] = FUSEDQ_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
      t[8 * j + 4 + i] =
          FUSEDQ_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      const Words a = t[4 * j + i], b = t[8 + 4 * j + i];
      columns[4 * j + i] =
          FUSEDQ_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
      columns[8 + 4 * j + i] =
          FUSEDQ_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
#undef FUSEDQ_SHUFFLE
}

}  // namespace fusedq
