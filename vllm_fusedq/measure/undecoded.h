// cpu-fused with its decoding left out: words are multiplied as they lie in memory, so its answers
// are wrong by design. Everything else is the operator's own code, before whose units this stands.
#pragma once

#include "decode.h"

namespace fusedq {

template <typename Machine>
struct Undecoded : Machine {
  template <Codes codes>
  static FUSEDQ_INLINE typename Machine::Pair decode(Words word, int plane, Words zeros,
                                                     const typename Machine::Tables& tables) {
    if constexpr (std::is_same_v<typename Machine::Pair, Words>) {
      return word;
    } else {
      // Never subnormal, which multiplies slowly on some CPUs
      const Floats value = (Floats)(word & splat(0x007FFFFF) | splat(0x3F800000));
      return {value, value};
    }
  }
};

}  // namespace fusedq

#define Bf16 Undecoded<Bf16>
#define Fp32 Undecoded<Fp32>
#define fusedq_cpu fusedq_undecoded
