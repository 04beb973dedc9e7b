// The experts of a layer in one call: those that tokens chose, each for the tokens that chose it.
//
// A slot is token * top_k + choice. Slots are sorted by expert, in their own order within one, and
// what lies between the products is kept in that order. Products, activation and sums are rounded
// where operators of their own would round; a token's sum has the order of its experts. So a token
// has the same bits in every batch and with any number of threads.
#pragma once

#include <atomic>
#include <numeric>

#include "activation.h"

namespace fusedq {
namespace {

// int32 or int64.
struct Integers {
  const void* data;
  bool wide;
  int64_t size;

  explicit Integers(const Tensor& of)
      : data(of.const_data_ptr()), wide(of.scalar_type() == ScalarType::Long), size(of.numel()) {}
  int64_t operator[](int64_t i) const {
    return wide ? ((const int64_t*)data)[i] : ((const int32_t*)data)[i];
  }
  Integers part(int64_t first, int64_t count) const {
    Integers found = *this;
    found.data = (const char*)data + first * (wide ? 8 : 4), found.size = count;
    return found;
  }
};

struct Slots {
  int64_t first, count;  // of one expert, in `order`
  int64_t expert;
};

struct Sorted {
  std::vector<int32_t> order;   // slots, by expert
  std::vector<int32_t> tokens;  // of each
  std::vector<Slots> chosen;    // experts of this rank that have any, ascending
};

Sorted sort_slots(const Integers& ids, const std::optional<Integers>& places, int64_t count,
                  int64_t top_k) {
  std::vector<int32_t> expert(ids.size), next(count + 1);
  for (int64_t slot = 0; slot < ids.size; slot++) {
    int64_t id = ids[slot];
    if (places) id = id >= 0 && id < places->size ? (*places)[id] : -1;
    expert[slot] = id >= 0 && id < count ? (int32_t)id : -1;
    if (expert[slot] >= 0) next[expert[slot] + 1]++;
  }
  Sorted found;
  for (int64_t each = 0; each < count; each++) {
    if (next[each + 1]) found.chosen.push_back({next[each], next[each + 1], each});
    next[each + 1] += next[each];
  }
  found.order.resize(next[count]), found.tokens.resize(next[count]);
  for (int64_t slot = 0; slot < ids.size; slot++)
    if (expert[slot] >= 0) {
      const int64_t at = next[expert[slot]]++;
      found.order[at] = (int32_t)slot, found.tokens[at] = (int32_t)(slot / top_k);
    }
  return found;
}

// A stack of weights, with what each may have beside it.
struct Stack {
  const Tensor &qweight, &scales;
  const std::optional<Tensor>&bias, &perm;
  Described told;

  const int32_t* perm_of(int64_t expert) const {
    return perm ? (const int32_t*)perm->const_data_ptr() + expert * perm->stride(0) : nullptr;
  }
  const uint16_t* bias_of(int64_t expert) const {
    return bias ? (const uint16_t*)bias->const_data_ptr() + expert * bias->stride(0) : nullptr;
  }
};

// Rows of x times the weight of each row's expert, into rows of y in the order of slots: row i of
// them is row `rows[i]` of x, or row i. `after(slot, count, first, last)` follows each piece.
template <typename After>
void multiply(const Stack& stack, const std::vector<Slots>& chosen, const uint16_t* x,
              int64_t stride, const int32_t* rows, uint16_t* y, int64_t n, bool half,
              const After& after) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t shares = std::max<int64_t>(1, divide_up(4 * threads, chosen.size()));
  const Kernel kernel = kernel_for(stack.told.codes(), half);
  std::vector<Product> products;
  std::vector<int64_t> ends, at{0};
  products.reserve(chosen.size());
  for (const Slots& each : chosen) {
    const Input in{rows ? x : x + each.first * stride,
                   stride,
                   half,
                   stack.perm_of(each.expert),
                   stack.told.numbers[Described::kFeatures],
                   stack.told.numbers[Described::kPad],
                   rows ? rows + each.first : nullptr};
    const Weight weight = stack.told.weight(stack.qweight, stack.scales, each.expert);
    const Output out{y + each.first * n, n, half, stack.told.row_scales(weight),
                     stack.bias_of(each.expert)};
    products.emplace_back(kernel, weight, in, each.count, out, shares);
    ends.push_back((ends.empty() ? 0 : ends.back()) + products.back().pieces());
    at.push_back(at.back() + products.back().arranged_bytes());
  }
  char* memory = scratch<0>(at.back());
  torch::stable::parallel_for(0, products.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) products[i].arrange_few(memory + at[i]);
  });
  Tables tables;
  kernel.fill(stack.told.table, tables);
  // Experts have different numbers of tokens: who is done takes the next piece
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t piece; (piece = next++) < ends.back();) {
      const size_t i = std::upper_bound(ends.begin(), ends.end(), piece) - ends.begin();
      const auto done = products[i].piece(piece - (i ? ends[i - 1] : 0), tables);
      after(chosen[i].first + done.start, done.count, done.first, done.last);
    }
  });
}

typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

Floats load_16(const uint16_t* from, bool half) {
  return from_16(__builtin_convertvector(load<Halves>(from), Words), half);
}

// Outputs [first, last) of a row of sums, which start and end with whole pairs of 8, into `to`.
void activate(const Activation& activation, const uint16_t* sums, int64_t first, int64_t last,
              uint16_t* to, bool half) {
  const int step = activation.takes_pairs() ? 2 * kLanes : kLanes;
  for (int64_t n = first; n < last; n += step) {
    const int64_t count = std::min<int64_t>(step, last - n);
    uint16_t values[2 * kLanes] = {};
    std::memcpy(values, sums + n, 2 * count);
    Floats gate = load_16(values, half), up{};
    if (activation.takes_pairs()) {
      const Floats later = load_16(values + kLanes, half), both = gate;
      gate = __builtin_shufflevector(both, later, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
      up = __builtin_shufflevector(both, later, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    const Halves rounded =
        __builtin_convertvector(to_16(activated(activation, gate, up), half), Halves);
    const int64_t outputs = count * kLanes / step;
    std::memcpy(to + n * kLanes / step, &rounded, 2 * outputs);
  }
}

// Each token's rows of y, which are in the order of slots, by their weights.
void add_up(const Sorted& sorted, const uint16_t* y, const float* weights, int64_t tokens,
            int64_t n, uint16_t* out, bool half) {
  std::vector<int32_t> starts(tokens + 1), rows(sorted.tokens.size());
  for (const int32_t token : sorted.tokens) starts[token + 1]++;
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  std::vector<int32_t> next(starts.begin(), starts.end() - 1);
  for (size_t row = 0; row < sorted.tokens.size(); row++)
    rows[next[sorted.tokens[row]]++] = (int32_t)row;
  constexpr int64_t kColumns = 512;
  const int64_t parts = divide_up(n, kColumns);
  torch::stable::parallel_for(0, tokens * parts, 16, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; index++) {
      const int64_t token = index / parts, first = index % parts * kColumns;
      const int64_t last = std::min(first + kColumns, n);
      for (int64_t column = first; column < last; column += kLanes) {
        const int64_t lanes = std::min<int64_t>(kLanes, last - column);
        Floats sum{};
        for (int32_t i = starts[token]; i < starts[token + 1]; i++) {
          uint16_t values[kLanes] = {};
          std::memcpy(values, y + rows[i] * n + column, 2 * lanes);
          sum = multiply_add(load_16(values, half), splat(weights[sorted.order[rows[i]]]), sum);
        }
        const Halves rounded = __builtin_convertvector(to_16(sum, half), Halves);
        std::memcpy(out + token * n + column, &rounded, 2 * lanes);
      }
    }
  });
}

struct Layer {
  Stack up, down;
  Activation activation;
  int64_t count, inner, outer;  // experts, features between the products and behind the second
  bool half;

  int64_t sums() const { return activation.takes_pairs() ? 2 * inner : inner; }
  // Of a slot, between the products; sums of the first make place for rows of the second.
  int64_t bytes() const { return 2 * (std::max(sums(), outer) + inner); }

  void run(const Integers& ids, const std::optional<Integers>& places, const float* weights,
           const uint16_t* x, int64_t stride, int64_t tokens, uint16_t* out) const {
    const Sorted sorted = sort_slots(ids, places, count, ids.size / tokens);
    const int64_t slots = sorted.order.size(), width = sums();
    auto* hidden = (uint16_t*)scratch<2>(slots * bytes());
    uint16_t* rows = hidden + slots * inner;
    if (slots) {
      multiply(up, sorted.chosen, x, stride, sorted.tokens.data(), rows, width, half,
               [&](int64_t first, int64_t number, int64_t from, int64_t until) {
                 for (int64_t slot = first; slot < first + number; slot++)
                   activate(activation, rows + slot * width, from, until, hidden + slot * inner,
                            half);
               });
      multiply(down, sorted.chosen, hidden, inner, nullptr, rows, outer, half,
               [](int64_t, int64_t, int64_t, int64_t) {});
    }
    add_up(sorted, rows, weights, tokens, outer, out, half);
  }
};

// Between the products so many bytes are kept at a time: experts of many tokens read their weights
// for each part of them.
constexpr int64_t kPassBytes = 128 << 20;

}  // namespace

// numbers, codebooks: those of matmul_out, w13's and then w2's. activation: its number, constants:
// its limit (NaN for none), alpha and beta. Operands have been checked in ../cpu/fused_experts.py.
void experts_out(Tensor out, const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
                 const std::optional<Tensor>& expert_map, const Tensor& w13_qweight,
                 const Tensor& w13_scales, const std::optional<Tensor>& w13_bias,
                 const std::optional<Tensor>& w13_perm, const Tensor& w2_qweight,
                 const Tensor& w2_scales, const std::optional<Tensor>& w2_bias,
                 const std::optional<Tensor>& w2_perm, std::vector<int64_t> numbers,
                 std::vector<double> codebooks, int64_t inner, int64_t activation,
                 std::vector<double> constants) {
  const int64_t tokens = x.size(0), top_k = topk_ids.size(1);
  if (tokens == 0) return;
  const auto part = [](const auto& all, int which) {
    const auto middle = all.begin() + all.size() / 2;
    return which ? std::decay_t<decltype(all)>(middle, all.end())
                 : std::decay_t<decltype(all)>(all.begin(), middle);
  };
  const auto first = part(numbers, 0), second = part(numbers, 1);
  const Layer layer{{w13_qweight, w13_scales, w13_bias, w13_perm, {first, part(codebooks, 0)}},
                    {w2_qweight, w2_scales, w2_bias, w2_perm, {second, part(codebooks, 1)}},
                    {(Curve)activation, constants[0] == constants[0], (float)constants[0],
                     (float)constants[1], (float)constants[2]},
                    w13_qweight.size(0),
                    inner,
                    out.size(1),
                    x.scalar_type() == ScalarType::Half};
  const Integers ids(topk_ids);
  std::optional<Integers> places;
  if (expert_map) places.emplace(*expert_map);
  const int64_t most = std::max<int64_t>(1, kPassBytes / (top_k * layer.bytes()));
  const int64_t at_once = divide_up(tokens, divide_up(tokens, most));
  for (int64_t token = 0; token < tokens; token += at_once) {
    const int64_t number = std::min(at_once, tokens - token);
    layer.run(ids.part(token * top_k, number * top_k), places,
              (const float*)topk_weights.const_data_ptr() + token * top_k,
              (const uint16_t*)x.const_data_ptr() + token * x.stride(0), x.stride(0), number,
              (uint16_t*)out.mutable_data_ptr() + token * layer.outer);
  }
}

}  // namespace fusedq
