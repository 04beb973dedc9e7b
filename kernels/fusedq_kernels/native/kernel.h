// What the kernel of some codes is to those that call it: one is compiled by a unit of its own.
#pragma once

#include "scales.h"

namespace fusedq {

struct Weight {
  const int32_t* words;  // [blocks, n_padded, words_of(codes)]
  int64_t blocks, n_padded;
  Scales scales;
  Groups groups;
};

// Tokens as the kernel reads them: feature k of a block's token at block * block_stride + token *
// token_stride + k. Features are the machine's `Activation`.
struct Tokens {
  const void* x;
  int64_t block_stride, token_stride;
  int count;
};

// Outputs [first, last), multiples of kStrip; `totals` [token][output - first] are added to.
struct Part {
  int64_t first, last;
  float* totals;
  int64_t stride;
};

// Blocks of which the decoded weight is kept at a time, for many tokens.
constexpr int kPanelBlocks = 4;

// What a machine decodes with; filled once for a call.
struct alignas(64) Tables {
  char bytes[320];
};

struct Kernel {
  int activation_bytes;  // 2: as they are, bf16; 4: fp32
  int few_tokens;        // up to so many the weight is decoded in registers
  int64_t panel_bytes;
  void (*fill)(const float* codebook, Tables& tables);
  // All blocks; tokens are at most few_tokens, 2 where a run has several scales.
  void (*few)(const Weight&, const Tokens&, const Part&, const Tables&, const Spread&);
  // Blocks [first, first + blocks), with which x starts as well; panel: so many bytes.
  void (*many)(const Weight&, int64_t first, int blocks, const Tokens& x, const Part&,
               const Tables&, const Spread&, void* panel);
};

// For activations of fp16, or of bf16.
template <Codes codes>
Kernel kernel_of(bool half);

}  // namespace fusedq
