// y = x W^T for some outputs and tokens of one thread, from a weight in a tiled layout.
//
// Lanes are outputs. There is one order of sums whatever the number of tokens: the products of a
// run (or of the part of it that shares a scale) are added in the order of K from zero, the sum is
// multiplied by the scale and added to the total. So a token has the same bits in every batch.
#pragma once

#include <utility>

#include "scales.h"

namespace fusedq {

struct Weight {
  const int32_t* words;  // [blocks, n_padded, words_of(codes)]
  int64_t blocks, n_padded;
  Scales scales;
  Groups groups;
};

// Tokens as the kernel reads them: feature k of a block's token at block * block_stride + token *
// token_stride + k.
template <typename Activation>
struct Tokens {
  const Activation* x;
  int64_t block_stride, token_stride;
  int count;
};

// Outputs [first, last), multiples of kStrip; `totals` [token][output - first] are added to.
struct Part {
  int64_t first, last;
  float* totals;
  int64_t stride;
};

constexpr int kTileUnits = kStrip / kLanes;
constexpr int kPanelBlocks = 4;
// Bytes that are asked of memory before they are needed.
constexpr int kAhead = 16384;

#define FUSEDQ_UNROLL _Pragma("GCC unroll 16")

// The weight is decoded in registers, as it streams by. `share` words of a run have one scale.
template <typename Machine, Codes codes, int tokens, int share>
void few(const Weight& weight, const Tokens<typename Machine::Activation>& x, const Part& part,
         const typename Machine::Tables& tables_, const Spread& spread) {
  constexpr int words = words_of(codes), sets = sets_of(codes);
  // Sums that grow side by side hide the latency of an addition; those of small parts are short,
  // and one run's go to the total before the next's.
  constexpr int few_sums = tokens <= 2 ? runs_of_set(codes) : tokens <= 4 ? 2 : 1;
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
      spread_scales<Machine, codes>(weight.scales, groups, block, part.first, part.last, spread);
    const auto* xb = x.x + block * x.block_stride;
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
      FUSEDQ_UNROLL for (int set = 0; set < sets; set++) {
        FUSEDQ_UNROLL for (int i = 0; i < 16; i++) __builtin_prefetch(later + (set + i * sets) * 16);
        Words t[16];
        transpose(source + 16 * set, words, t);
        FUSEDQ_UNROLL for (int first = 0; first < runs_of_set(codes); first += together)
          FUSEDQ_UNROLL for (int from = 0; from < 16; from += share) {
            Floats sum[together][tokens];
            Words zeros[together];
            int64_t at[together];
            FUSEDQ_UNROLL for (int i = 0; i < together; i++) {
              const int feature = kRun * run_at(codes, set, first + i) + 2 * from;
              at[i] = (feature >> shift) * spread.stride + n;
              zeros[i] = reads_zeros(codes) ? load<Words>(spread.zeros + at[i]) : Words{};
              FUSEDQ_UNROLL for (int m = 0; m < tokens; m++) sum[i][m] = Floats{};
            }
            FUSEDQ_UNROLL for (int w = from; w < from + share; w++)
              FUSEDQ_UNROLL for (int i = 0; i < together; i++) {
                const auto pair = Machine::template decode<codes>(t[w], first + i, zeros[i], tables);
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
      }
      FUSEDQ_UNROLL for (int m = 0; m < tokens; m++) store(totals + m * part.stride, total[m]);
    }
  }
}

// The decoded weight of kStrip outputs and the blocks of a panel.
template <typename Machine>
struct Panel {
  typename Machine::Pair pairs[kPanelBlocks][kRuns][16][kTileUnits];
};

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

// `tokens` tokens times a decoded panel of `blocks` blocks.
template <typename Machine, Codes codes, int tokens, bool whole>
void tile(const Panel<Machine>& panel, int blocks, int step, const Spread& spread,
          const typename Machine::Activation* x, int64_t block_stride, float* totals, int64_t stride) {
  const int part = whole ? kRun : step;
  Floats total[tokens][kTileUnits];
  FUSEDQ_UNROLL for (int m = 0; m < tokens; m++)
    FUSEDQ_UNROLL for (int u = 0; u < kTileUnits; u++)
      total[m][u] = load<Floats>(totals + m * stride + u * kLanes);
  for (int block = 0; block < blocks; block++)
    for (int order = 0; order < kRuns; order++) {
      const int run = run_at(codes, order / runs_of_set(codes), order % runs_of_set(codes));
      for (int start = 0; start < kRun; start += part) {
        Floats sum[tokens][kTileUnits];
        FUSEDQ_UNROLL for (int m = 0; m < tokens; m++)
          FUSEDQ_UNROLL for (int u = 0; u < kTileUnits; u++) sum[m][u] = Floats{};
        const auto* xs = x + block * block_stride + kRun * run;
        FUSEDQ_UNROLL for (int i = 0; i < part / 2; i++) {
          const int w = start / 2 + i;
          const auto& pairs = panel.pairs[block][run][w];
          FUSEDQ_UNROLL for (int m = 0; m < tokens; m++)
            FUSEDQ_UNROLL for (int u = 0; u < kTileUnits; u++)
              sum[m][u] = Machine::dot(pairs[u], xs + m * kBlock + 2 * w, sum[m][u]);
        }
        const int64_t at = (block * (kBlock / step) + (kRun * run + start) / step) * spread.stride;
        FUSEDQ_UNROLL for (int u = 0; u < kTileUnits; u++) {
          const Floats scale = load<Floats>(spread.scales + at + u * kLanes);
          FUSEDQ_UNROLL for (int m = 0; m < tokens; m++)
            total[m][u] = multiply_add(sum[m][u], scale, total[m][u]);
        }
      }
    }
  FUSEDQ_UNROLL for (int m = 0; m < tokens; m++)
    FUSEDQ_UNROLL for (int u = 0; u < kTileUnits; u++)
      store(totals + m * stride + u * kLanes, total[m][u]);
}

// Many tokens times the blocks of one panel, which start at `first_block`; `x` starts there as well.
template <typename Machine, Codes codes>
void many(const Weight& weight, int64_t first_block, int blocks,
          const Tokens<typename Machine::Activation>& x, const Part& part,
          const typename Machine::Tables& tables, const Spread& spread, Panel<Machine>& panel) {
  const Groups& groups = weight.groups;
  for (int64_t n = part.first; n < part.last; n += kStrip) {
    for (int index = 0; index < blocks; index++) {
      const int64_t shift = index * groups.parts() * spread.stride;
      const Spread own{spread.scales + shift, spread.zeros + shift, spread.stride};
      spread_scales<Machine, codes>(weight.scales, groups, first_block + index, n, n + kStrip, own);
      decode_panel<Machine, codes>(weight, first_block + index, n, own, index, tables, panel);
    }
    float* totals = part.totals + (n - part.first);
    const auto run = [&]<int tokens>(int m) {
      const auto multiply = groups.step >= kRun ? tile<Machine, codes, tokens, true>
                                                : tile<Machine, codes, tokens, false>;
      multiply(panel, blocks, groups.step, spread, x.x + m * x.token_stride, x.block_stride,
               totals + m * part.stride, part.stride);
    };
    constexpr int most = Machine::kTileTokens;
    int m = 0;
    for (; m + most <= x.count; m += most) run.template operator()<most>(m);
    if constexpr (most > 4) {
      if (x.count - m >= 4) run.template operator()<4>(m), m += 4;
    }
    if (x.count - m >= 2) run.template operator()<2>(m), m += 2;
    if (x.count - m >= 1) run.template operator()<1>(m);
  }
}

}  // namespace fusedq
