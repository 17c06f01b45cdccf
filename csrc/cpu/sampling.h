// Sampling from one row of logits, float32 [n]; n is at least 1. Ties go to the lower id.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.h"
#include "philox.h"
#include "pool.h"

namespace octavo {

// Who computes. Rows are cut into pieces of kRowPiece values, which threads do in parallel; what comes of the pieces is
// put together in order, so that results do not depend on the threads.
struct RowWorkers {
  const Kernels& kernels;
  Pool* pool;  // held by the caller, see Pool::Session; null: the caller's thread alone
};

struct Filters {
  double temperature;
  std::size_t top_k;  // 0: off
  double top_p, min_p;
};

using Greatest = std::pair<std::size_t, float>;  // index and value

// NaN if any value is; the index is inside the row in any case.
Greatest greatest(const RowWorkers& workers, const float* x, std::size_t n);

// Natural logarithm of the sum of e^x; `top` is the greatest value.
double log_sum_exp(const RowWorkers& workers, const float* x, std::size_t n, float top);

// out = x - normalizer, a row's log_sum_exp, rounded from float64.
void log_softmax(const RowWorkers& workers, const float* x, std::size_t n, double normalizer, float* out);

// Indices of the k greatest, greatest first. Throws std::invalid_argument if any value is NaN.
std::vector<int32_t> best(const RowWorkers& workers, const float* x, std::size_t n, std::size_t k);

// One token: those that min_p, top_k and top_p leave, in this order, then the argmax with Gumbel noise. `top` is the
// row's greatest and finite.
std::size_t draw(const RowWorkers& workers, const float* x, std::size_t n, const Greatest& top, const Filters& filters,
                 const NoiseKey& key);

}  // namespace octavo
