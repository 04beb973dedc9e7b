// Many tokens times the decoded weight of some outputs: the same whatever the codes were.
#pragma once

#include "decode.h"

namespace fusedq {

constexpr int kTileUnits = kStrip / kLanes;

// The decoded weight of kStrip outputs and the blocks of a panel.
template <typename Machine>
struct Panel {
  typename Machine::Pair pairs[kPanelBlocks][kRuns][16][kTileUnits];
};

// Adds to `totals`, of `stride`. Runs are taken in the order of `sets` of words, as for few tokens.
template <typename Machine, int sets>
void multiply_panel(const Panel<Machine>& panel, int blocks, int step, const Spread& spread,
                    const Tokens& x, float* totals, int64_t stride);

}  // namespace fusedq
