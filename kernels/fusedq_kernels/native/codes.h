// Kinds of codes, and where a tiled layout keeps them.
//
// A run is 32 consecutive input features of a K block, kept by 16 words: run r of layouts P4 and
// PL4 is plane r of words 0 to 15; of P8 it is plane r / 2 of words 16 (r % 2) and up. A word
// yields the pair of features 2 w and 2 w + 1 of its run (../layouts/tiled.py draws the words).
#pragma once

namespace fusedq {

enum class Codes { kInt4, kInt4Zeros, kCodebook4, kInt8, kFloatE4M3, kFloatE2M1 };

constexpr int kBlock = 128;
constexpr int kRun = 32;
constexpr int kRuns = kBlock / kRun;

// Words of a row and K block; sets of 16 of them are transposed together.
constexpr int words_of(Codes codes) {
  return codes == Codes::kInt8 || codes == Codes::kFloatE4M3 ? 32 : 16;
}
constexpr int sets_of(Codes codes) { return words_of(codes) / 16; }
constexpr int runs_of_set(Codes codes) { return kRuns / sets_of(codes); }
constexpr int run_at(Codes codes, int set, int plane) { return plane * sets_of(codes) + set; }
// Bits from a word's plane to its next.
constexpr int plane_bits(Codes codes) {
  return words_of(codes) == 32 || codes == Codes::kCodebook4 ? 8 : 4;
}
// Whether a group has zero points that were read, rather than the constant of the type.
constexpr bool reads_zeros(Codes codes) {
  return codes == Codes::kInt4Zeros || codes == Codes::kInt8;
}

}  // namespace fusedq
