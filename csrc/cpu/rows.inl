// Rows of logits: maxima, sums of exponentials, and who wins a draw. Sums run in fixed pieces merged in order.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "math.inl"
#include "philox.h"

namespace octavo::OCTAVO_ISA {

constexpr std::size_t kSkip = 64;  // values looked at together when few of them are wanted

// 16 values from x + i on; those from n on are -inf.
OCTAVO_INLINE F load_row(const float* x, std::size_t i, std::size_t n) {
  if (i + kLanes <= n) return load(x + i);
  float values[kLanes];
  for (std::size_t lane = 0; lane < kLanes; ++lane) values[lane] = i + lane < n ? x[i + lane] : -INFINITY;
  return load(values);
}

// The greatest value; NaN if any is.
float row_max(const float* x, std::size_t n) {
  F top = set1(-INFINITY);
  I bits = set1i(0);
  for (std::size_t i = 0; i < n; i += kLanes) {
    const F value = load_row(x, i, n);
    top = max(value, top);
    bits = maxi(bits, as_int(abs(value)));
  }
  int32_t lanes[kLanes];
  store(reinterpret_cast<float*>(lanes), as_float(bits));
  const bool damaged = *std::max_element(lanes, lanes + kLanes) > 0x7f800000;
  return damaged ? std::bit_cast<float>(0x7fc00000) : highest_of(top);
}

// Sum of e^((x - top) / temperature).
double row_sum_exp(const float* x, std::size_t n, float top, float inverse_temperature) {
  double total = 0.0;
  for (std::size_t piece = 0; piece < n; piece += kRowPiece) {
    const std::size_t stop = std::min(piece + kRowPiece, n);
    F sum = zero();
    for (std::size_t i = piece; i < stop; i += kLanes) {
      sum = add(sum, exp(mul(sub(load_row(x, i, n), set1(top)), set1(inverse_temperature))));
    }
    total += static_cast<double>(sum_of(sum));
  }
  return total;
}

void row_shift(const float* x, std::size_t n, double by, float* out) {
  for (std::size_t i = 0; i < n; ++i) out[i] = static_cast<float>(static_cast<double>(x[i]) - by);
}

// Indices of [first, last) whose value is above the threshold, ascending; how many there are.
std::size_t row_above(const float* x, std::size_t first, std::size_t last, float threshold, int32_t* ids) {
  std::size_t count = 0;
  std::size_t i = first;
  for (; i + kSkip <= last; i += kSkip) {
    const F top = max(max(load(x + i), load(x + i + 16)), max(load(x + i + 32), load(x + i + 48)));
    if (!(highest_of(top) > threshold)) continue;
    for (std::size_t j = i; j < i + kSkip; ++j) {
      ids[count] = static_cast<int32_t>(j);
      count += x[j] > threshold;
    }
  }
  for (; i < last; ++i) {
    ids[count] = static_cast<int32_t>(i);
    count += x[i] > threshold;
  }
  return count;
}

// Values greater than that of `id`, or equal and before it.
std::size_t row_rank(const float* x, std::size_t n, std::size_t id) {
  const float value = x[id];
  std::size_t rank = 0;
  for (std::size_t i = 0; i < n; ++i) rank += x[i] > value;
  for (std::size_t i = 0; i < id; ++i) rank += x[i] == value;
  return rank;
}

// argmax of (x - top) / temperature + Gumbel noise. A token whose noise would have to be rarer than 1 in its e^-score
// cannot win: -log u < e^(score - best) is needed, and 1 - u < -log u; so few logarithms are taken.
std::size_t row_draw(const float* x, std::size_t n, std::size_t start, float top, double temperature,
                     const NoiseKey& key) {
  const auto score = [&](std::size_t i) {
    return (static_cast<double>(x[i]) - static_cast<double>(top)) / temperature + gumbel(key, static_cast<uint32_t>(i));
  };
  std::size_t winner = start;
  double best = score(start);
  const auto inverse = std::max(static_cast<float>(1.0 / temperature), std::numeric_limits<float>::min());
  for (std::size_t i = 0; i < n; i += kSkip) {
    uint32_t words[4][kSkip / 4];
    philox_groups(key, static_cast<uint32_t>(i / 4), words);
    float limits[kSkip];
    for (std::size_t j = 0; j < kSkip; j += kLanes) {
      const F logit = mul(sub(load_row(x, i + j, n), set1(top)), set1(inverse));
      store(limits + j, exp(sub(logit, set1(static_cast<float>(best)))));
    }
    for (std::size_t j = 0; j < std::min(kSkip, n - i); ++j) {
      const float rest = static_cast<float>(~words[j % 4][j / 4]) * 0x1p-32f;  // 1 - u, a little less
      if (rest > limits[j] * 1.001f || x[i + j] == -INFINITY) continue;
      const double perturbed = score(i + j);
      if (perturbed > best || (perturbed == best && i + j < winner)) {
        best = perturbed;
        winner = i + j;
      }
    }
  }
  return winner;
}

}  // namespace octavo::OCTAVO_ISA
