// The CPU ops, one a file. Pointers are to dense row-major arrays that the caller owns; no op allocates or keeps any.
#pragma once

#include <cstddef>

namespace octavo {

// y[t, i] = x[t, i] * weight[i] / sqrt(mean_i(x[t, i]^2) + eps), float32 (Zhang and Sennrich, 2019).
// The sum of squares is made of 16 partial sums (element i goes to sum i mod 16) folded by a fixed tree, so that the
// result depends on the row alone, whatever the number of rows, threads or vector lanes.
void rms_norm(const float* x, const float* weight, float* y, std::size_t rows, std::size_t columns, float eps);

}  // namespace octavo
