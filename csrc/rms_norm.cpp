#include <cmath>

#include "ops.h"

namespace octavo {

namespace {

constexpr std::size_t kLanes = 16;

float sum_of_squares(const float* row, std::size_t columns) {
  float partial[kLanes] = {};
  std::size_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) partial[lane] += row[i + lane] * row[i + lane];
  }
  for (std::size_t lane = 0; i + lane < columns; ++lane) partial[lane] += row[i + lane] * row[i + lane];
  for (std::size_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::size_t lane = 0; lane < width; ++lane) partial[lane] += partial[lane + width];
  }
  return partial[0];
}

}  // namespace

void rms_norm(const float* x, const float* weight, float* y, std::size_t rows, std::size_t columns, float eps) {
  for (std::size_t t = 0; t < rows; ++t, x += columns, y += columns) {
    const float mean = sum_of_squares(x, columns) / static_cast<float>(columns);
    const float scale = 1.0f / std::sqrt(mean + eps);
    for (std::size_t i = 0; i < columns; ++i) y[i] = x[i] * scale * weight[i];
  }
}

}  // namespace octavo
