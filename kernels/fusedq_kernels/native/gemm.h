// y = x W^T for some outputs and tokens of one thread, from a weight in a tiled layout.
//
// Lanes are outputs. There is one order of sums whatever the number of tokens: the products of a
// run (or of the part of it that shares a scale) are added in the order of K from zero, the sum is
// multiplied by the scale and added to the total. So a token has the same bits in every batch.
#pragma once

#include <new>
#include <utility>

#include "tile.h"

namespace fusedq {

// Words are shifted from run to run, which is by a constant, where registers hold all 16.
#if defined(__AVX512F__)
constexpr bool kShiftsInPlace = true;
#else
constexpr bool kShiftsInPlace = false;
#endif
// Bytes that are asked of memory before they are needed.
constexpr int kAhead = 16384;

// The weight is decoded in registers, as it streams by. `share` words of a run have one scale.
template <typename Machine, Codes codes, int tokens, int share>
void few(const Weight& weight, const Tokens& x, const Part& part,
         const typename Machine::Tables& tables_, const Spread& spread) {
  constexpr int words = words_of(codes), sets = sets_of(codes), runs = runs_of_set(codes);
  // Sums that grow side by side hide the latency of an addition; those of small parts are short,
  // and one run's go to the total before the next's.
  constexpr int few_sums = tokens <= 2 ? runs : tokens <= 4 ? 2 : 1;
  constexpr int together = share == 16 ? few_sums : 1;
  const typename Machine::Tables tables = tables_;
  const Groups& groups = weight.groups;
  const int shift = __builtin_ctz(groups.step);
  const int64_t width = part.last - part.first, token_stride = x.token_stride;
  const int64_t ahead = std::min<int64_t>(kAhead / 4 / words, width);
  for (int64_t block = 0; block < weight.blocks; block++) {
    const bool same =
        block && groups.parts() == 1 && groups.at(block, 0) == groups.at(block - 1, 0);
    if (!same)
      spread_scales(weight.scales, groups, block, part.first, part.last, Machine::zero_as(codes),
                    spread);
    const auto* xb = (const typename Machine::Activation*)x.x + block * x.block_stride;
    const int32_t* source = weight.words + (block * weight.n_padded + part.first) * words;
    const bool is_last = block + 1 == weight.blocks;
    const int64_t to_next = is_last ? 0 : (weight.n_padded - width) * words;
    const char* scales_ahead = weight.scales.at(groups.at(block + !is_last, 0), part.first);
    for (int64_t n = 0; n < width; n += kLanes, source += kLanes * words) {
      const int32_t* later = source + ahead * words + (n + ahead < width ? 0 : to_next);
      __builtin_prefetch(scales_ahead + n * weight.scales.row_bytes());
      float* totals = part.totals + n;
      Floats total[tokens];
      FUSEDQ_UNROLL for (int m = 0; m < tokens; m++)
        total[m] = load<Floats>(totals + m * part.stride);
      for (int set = 0; set < sets; set++) {
        FUSEDQ_UNROLL for (int i = 0; i < 16; i++) __builtin_prefetch(later + (set + i * sets) * 16);
        Words t[16];
        transpose(source + 16 * set, words, t);
        for (int first = 0; first < runs; first += together) {
          FUSEDQ_UNROLL_WORDS for (int from = 0; from < 16; from += share) {
            Floats sum[together][tokens];
            Words zeros[together];
            int64_t at[together];
            FUSEDQ_UNROLL for (int i = 0; i < together; i++) {
              const int feature = kRun * run_at(codes, set, first + i) + 2 * from;
              at[i] = (feature >> shift) * spread.stride + n;
              zeros[i] = reads_zeros(codes) ? load<Words>(spread.zeros + at[i]) : Words{};
              FUSEDQ_UNROLL for (int m = 0; m < tokens; m++) sum[i][m] = Floats{};
            }
            FUSEDQ_UNROLL_WORDS for (int w = from; w < from + share; w++)
              FUSEDQ_UNROLL for (int i = 0; i < together; i++) {
                const int plane = kShiftsInPlace ? i : first + i;
                const auto pair = Machine::template decode<codes>(t[w], plane, zeros[i], tables);
                const auto* xs = xb + kRun * run_at(codes, set, first + i) + 2 * w;
                FUSEDQ_UNROLL for (int m = 0; m < tokens; m++)
                  sum[i][m] = Machine::dot(pair, xs + m * token_stride, sum[i][m]);
              }
            FUSEDQ_UNROLL for (int i = 0; i < together; i++) {
              const Floats scale = load<Floats>(spread.scales + at[i]);
              FUSEDQ_UNROLL for (int m = 0; m < tokens; m++)
                total[m] = multiply_add(sum[i][m], scale, total[m]);
            }
          }
          if (kShiftsInPlace && together < runs)
            FUSEDQ_UNROLL for (int w = 0; w < 16; w++)
              t[w] = (Words)((Bits)t[w] >> together * plane_bits(codes));
        }
      }
      FUSEDQ_UNROLL for (int m = 0; m < tokens; m++) store(totals + m * part.stride, total[m]);
    }
  }
}

template <typename Machine, Codes codes>
void run_few(const Weight& weight, const Tokens& x, const Part& part, const Tables& tables,
             const Spread& spread) {
  const auto& own = *(const typename Machine::Tables*)tables.bytes;
  const auto go = [&]<int share, int... m>(std::integer_sequence<int, m...>) {
    ((x.count == m + 1 ? few<Machine, codes, m + 1, share>(weight, x, part, own, spread) : void()),
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
void decode_panel(const Weight& weight, int64_t block, int64_t n, const Spread& spread, int index,
                  const typename Machine::Tables& tables_, Panel<Machine>& panel) {
  constexpr int words = words_of(codes);
  const typename Machine::Tables tables = tables_;
  const int shift = __builtin_ctz(weight.groups.step);
  for (int unit = 0; unit < kTileUnits; unit++) {
    const int32_t* source = weight.words + (block * weight.n_padded + n + unit * kLanes) * words;
    for (int set = 0; set < sets_of(codes); set++) {
      // The next outputs, which are decoded after this panel has been multiplied
      for (int i = 0; i < 16; i++) __builtin_prefetch(source + kStrip * words + (set + i * sets_of(codes)) * 16);
      Words t[16];
      transpose(source + 16 * set, words, t);
      FUSEDQ_UNROLL for (int plane = 0; plane < runs_of_set(codes); plane++) {
        const int run = run_at(codes, set, plane);
        for (int w = 0; w < 16; w++) {
          const int64_t at = ((kRun * run + 2 * w) >> shift) * spread.stride + unit * kLanes;
          const Words zeros = reads_zeros(codes) ? load<Words>(spread.zeros + at) : Words{};
          panel.pairs[index][run][w][unit] = Machine::template decode<codes>(t[w], plane, zeros, tables);
        }
      }
    }
  }
}

template <typename Machine, Codes codes>
void many(const Weight& weight, int64_t first_block, int blocks, const Tokens& x, const Part& part,
          const Tables& tables, const Spread& spread, void* memory) {
  const auto& own_tables = *(const typename Machine::Tables*)tables.bytes;
  const Groups& groups = weight.groups;
  auto& panel = *(Panel<Machine>*)memory;
  for (int64_t n = part.first; n < part.last; n += kStrip) {
    for (int index = 0; index < blocks; index++) {
      const int64_t shift = index * groups.parts() * spread.stride;
      const Spread own{spread.scales + shift, spread.zeros + shift, spread.stride};
      spread_scales(weight.scales, groups, first_block + index, n, n + kStrip,
                    Machine::zero_as(codes), own);
      decode_panel<Machine, codes>(weight, first_block + index, n, own, index, own_tables, panel);
    }
    multiply_panel<Machine, sets_of(codes)>(panel, blocks, groups.step, spread, x,
                                            part.totals + (n - part.first), part.stride);
  }
}

template <typename Machine, Codes codes>
Kernel kernel_on() {
  using Own = typename Machine::Tables;
  static_assert(sizeof(Own) <= sizeof(Tables));
  return {sizeof(typename Machine::Activation),
          Machine::kFewTokens,
          sizeof(Panel<Machine>),
          [](const float* codebook, Tables& tables) {
            new (tables.bytes) Own(Machine::tables(codes, codebook));
          },
          run_few<Machine, alike(codes)>,
          many<Machine, alike(codes)>};
}

template <Codes codes>
Kernel kernel_of(bool half) {
#if defined(FUSEDQ_BF16)
  // The codebook is in the dtype of the activations
  if (!half) return kernel_on<Bf16, codes>();
#endif
  return kernel_on<Fp32, codes>();
}

}  // namespace fusedq
