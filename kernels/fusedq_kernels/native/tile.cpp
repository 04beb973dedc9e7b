#include "tile.h"

namespace fusedq {
namespace {

template <typename Machine, int sets, int tokens, bool whole>
void tile(const Panel<Machine>& panel, int blocks, int step, const Spread& spread,
          const typename Machine::Activation* x, int64_t block_stride, float* totals,
          int64_t stride) {
  const int part = whole ? kRun : step;
  Floats total[tokens][kTileUnits];
  FUSEDQ_UNROLL for (int m = 0; m < tokens; m++)
    FUSEDQ_UNROLL for (int u = 0; u < kTileUnits; u++)
      total[m][u] = load<Floats>(totals + m * stride + u * kLanes);
  for (int block = 0; block < blocks; block++)
    for (int order = 0; order < kRuns; order++) {
      const int run = order / (kRuns / sets) + order % (kRuns / sets) * sets;
      for (int start = 0; start < kRun; start += part) {
        Floats sum[tokens][kTileUnits];
        FUSEDQ_UNROLL for (int m = 0; m < tokens; m++)
          FUSEDQ_UNROLL for (int u = 0; u < kTileUnits; u++) sum[m][u] = Floats{};
        const auto* xs = x + block * block_stride + kRun * run;
        FUSEDQ_UNROLL_WORDS for (int i = 0; i < part / 2; i++) {
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

}  // namespace

template <typename Machine, int sets>
void multiply_panel(const Panel<Machine>& panel, int blocks, int step, const Spread& spread,
                    const Tokens& x, float* totals, int64_t stride) {
  const auto run = [&]<int tokens>(int m) {
    const auto* xs = (const typename Machine::Activation*)x.x + m * x.token_stride;
    const auto multiply = step >= kRun ? tile<Machine, sets, tokens, true>
                                       : tile<Machine, sets, tokens, false>;
    multiply(panel, blocks, step, spread, xs, x.block_stride, totals + m * stride, stride);
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

#define FUSEDQ_PANEL(Machine, sets)                                                             \
  template void multiply_panel<Machine, sets>(const Panel<Machine>&, int, int, const Spread&, \
                                              const Tokens&, float*, int64_t);
FUSEDQ_PANEL(Fp32, 1)
FUSEDQ_PANEL(Fp32, 2)
#if defined(FUSEDQ_BF16)
FUSEDQ_PANEL(Bf16, 1)
FUSEDQ_PANEL(Bf16, 2)
#endif

}  // namespace fusedq
