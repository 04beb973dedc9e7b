// What an expert does between its two products (../activation.py), on lanes of fp32.
#pragma once

#include <cmath>

#include "lanes.h"

namespace fusedq {

// In the order of `ACTIVATIONS`; from kPlainSilu on they take no pairs.
enum class Curve {
  kSilu, kGelu, kGeluTanh, kSwigluStep, kSitu, kPlainSilu, kPlainGelu, kPlainGeluTanh, kPlainRelu2
};

struct Activation {
  Curve curve;
  bool has_limit;
  float limit, alpha, beta;

  bool takes_pairs() const { return curve < Curve::kPlainSilu; }
};

inline Floats choose(Words which, Floats yes, Floats no) {
  return (Floats)((which & (Words)yes) | (~which & (Words)no));
}
// NaN stays NaN.
inline Floats at_most(Floats x, float limit) { return choose(x > limit, splat(limit), x); }
inline Floats at_least(Floats x, float limit) { return choose(x < limit, splat(limit), x); }

// To about a unit in the last place; 0 below -88 and infinity above 88.8.
inline Floats exponential(Floats x) {
  const Floats within = at_least(at_most(x, 89.0f), -89.0f);
  const Floats whole = (within * 1.44269504f + 12582912.0f) - 12582912.0f;
  // ln 2 in two parts, of which the first one's multiples are exact
  const Floats rest = (within - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats series = splat(1.0f / 5040);
  for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    series = multiply_add(series, rest, splat(factor));
  const Words power = __builtin_convertvector(choose(x == x, whole, Floats{}), Words);
  // 2 ** 128 is no fp32, two halves of it are
  const Words half = power >> 1;
  series = series * (Floats)((half + 127) << 23) * (Floats)((power - half + 127) << 23);
  return choose(x < -88.0f, Floats{}, choose(x == x, series, x));
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

inline Floats hyperbolic_tangent(Floats x) {
  const Floats square = x * x;
  const Floats near_zero =
      x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315))));
  return choose(square < 0.01f, near_zero, 2.0f * sigmoid(2.0f * x) - 1.0f);
}

inline Floats gelu(Floats x) {
  Floats result;
  for (int lane = 0; lane < kLanes; lane++)
    result[lane] = 0.5f * x[lane] * (1.0f + std::erf(x[lane] * 0.70710678f));
  return result;
}

inline Floats gelu_tanh(Floats x) {
  // 1 + tanh(y) is twice the sigmoid of 2 y
  return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
}

inline Floats activated(const Activation& of, Floats gate, Floats up) {
  switch (of.curve) {
    case Curve::kSilu:
      if (of.has_limit) gate = at_most(gate, of.limit), up = at_least(at_most(up, of.limit), -of.limit);
      return gate * sigmoid(of.alpha * gate) * (up + of.beta);
    case Curve::kGelu:
      return gelu(gate) * up;
    case Curve::kGeluTanh:
      return gelu_tanh(gate) * up;
    case Curve::kSwigluStep:
      return at_most(gate * sigmoid(gate), of.limit) * at_least(at_most(up, of.limit), -of.limit);
    case Curve::kSitu:
      if (of.has_limit) up = of.limit * hyperbolic_tangent(up / of.limit);
      return of.alpha * hyperbolic_tangent(gate / of.alpha) * sigmoid(gate) * up;
    case Curve::kPlainSilu:
      return gate * sigmoid(gate);
    case Curve::kPlainGelu:
      return gelu(gate);
    case Curve::kPlainGeluTanh:
      return gelu_tanh(gate);
    default:
      return choose(gate < 0.0f, Floats{}, gate * gate);
  }
}

}  // namespace fusedq
