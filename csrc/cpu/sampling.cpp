#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace octavo {

namespace {

constexpr std::size_t kTopPiece = 256;  // values of which the greatest is kept
constexpr std::size_t kGrain = 4096;    // values of a row that a thread looks at between two looks for more to do
constexpr std::size_t kScan = 1024;     // values between two looks at whether the threshold can rise

std::size_t pieces_of(std::size_t n, std::size_t size) { return (n + size - 1) / size; }

// visit(piece, its first value, how many there are) for all pieces of a row.
template <class Visit>
void each_piece(const RowWorkers& workers, std::size_t n, std::size_t size, const Visit& visit) {
  const auto some = [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) visit(i, i * size, std::min(size, n - i * size));
  };
  if (workers.pool == nullptr) {
    some(0, pieces_of(n, size));
  } else {
    workers.pool->parallel(pieces_of(n, size), kGrain / size, some);
  }
}

// The greatest value of each piece; NaN where any is.
std::vector<float> maxima(const RowWorkers& workers, const float* x, std::size_t n) {
  std::vector<float> top(pieces_of(n, kTopPiece));
  each_piece(workers, n, kTopPiece, [&](std::size_t i, std::size_t first, std::size_t count) {
    top[i] = workers.kernels.row_max(x + first, count);
  });
  return top;
}

float greatest_of(const std::vector<float>& tops) {
  float top = -INFINITY;
  for (const float t : tops) {
    if (std::isnan(t)) return t;
    top = std::max(top, t);
  }
  return top;
}

double sum_exp(const RowWorkers& workers, const float* x, std::size_t n, float top, float inverse_temperature) {
  std::vector<double> sums(pieces_of(n, kRowPiece));
  each_piece(workers, n, kRowPiece, [&](std::size_t i, std::size_t first, std::size_t count) {
    sums[i] = workers.kernels.row_sum_exp(x + first, count, top, inverse_temperature);
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// A token and its value as it was when it was found: what is sorted must not change meanwhile.
struct Ranked {
  float value;
  int32_t id;
};

bool before(const Ranked& a, const Ranked& b) { return a.value != b.value ? a.value > b.value : a.id < b.id; }

Ranked ranked(const float* x, int32_t id) { return {std::isnan(x[id]) ? -INFINITY : x[id], id}; }

std::vector<int32_t> ids_of(const std::vector<Ranked>& all) {
  std::vector<int32_t> ids(all.size());
  std::transform(all.begin(), all.end(), ids.begin(), [](const Ranked& one) { return one.id; });
  return ids;
}

std::vector<int32_t> sorted(const float* x, const std::vector<int32_t>& ids) {
  std::vector<Ranked> all(ids.size());
  std::transform(ids.begin(), ids.end(), all.begin(), [x](int32_t id) { return ranked(x, id); });
  std::sort(all.begin(), all.end(), before);
  return ids_of(all);
}

double scaled(const float* x, std::size_t i, float top, double temperature) {
  return (static_cast<double>(x[i]) - static_cast<double>(top)) / temperature;
}

// How many of the candidates, best first, top_p keeps, when they are a part of a whole of this weight; SIZE_MAX if it
// would keep more than there are.
std::size_t nucleus(const float* x, const std::vector<int32_t>& ids, float top, const Filters& filters, double whole) {
  double sum = 0.0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (sum >= filters.top_p * whole) return std::max<std::size_t>(i, 1);
    sum += std::exp(scaled(x, static_cast<std::size_t>(ids[i]), top, filters.temperature));
  }
  return SIZE_MAX;
}

// Candidates, best first.
std::vector<int32_t> survivors(const RowWorkers& workers, const float* x, std::size_t n, float top,
                               const Filters& filters) {
  // Not 0, which times -inf would be NaN.
  const auto inverse = std::max(static_cast<float>(1.0 / filters.temperature), std::numeric_limits<float>::min());
  const double lowest = filters.min_p > 0.0 ? std::log(filters.min_p) : -INFINITY;
  const auto too_low = [&](int32_t id) {
    const double logit = scaled(x, static_cast<std::size_t>(id), top, filters.temperature);
    return !(logit >= lowest) || logit == -INFINITY;
  };
  if (filters.top_k == 0 && filters.min_p <= 0.0) {
    // Of the whole vocabulary: as a rule a few tokens make up top_p of it.
    const double whole = sum_exp(workers, x, n, top, inverse);
    for (std::size_t k = 64;; k *= 8) {
      std::vector<int32_t> ids = best(workers, x, n, std::min(k, n));
      const std::size_t kept = nucleus(x, ids, top, filters, whole);
      if (kept == SIZE_MAX && k < n) continue;
      ids.resize(std::min(kept, ids.size()));
      std::erase_if(ids, too_low);
      return ids;
    }
  }
  std::vector<int32_t> ids;
  if (filters.top_k > 0) {
    ids = best(workers, x, n, std::min(filters.top_k, n));
  } else {
    ids.resize(n);
    // A little lower than min_p says: what is above it is looked at again.
    const double threshold = static_cast<double>(top) + filters.temperature * lowest;
    const auto slack = static_cast<float>(threshold - 1e-5 * (1.0 + std::fabs(threshold)));
    ids.resize(workers.kernels.row_above(x, 0, n, slack, ids.data()));
    ids = sorted(x, ids);
  }
  std::erase_if(ids, too_low);
  if (filters.top_p < 1.0) {
    double whole = 0.0;
    for (const int32_t id : ids) whole += std::exp(scaled(x, static_cast<std::size_t>(id), top, filters.temperature));
    ids.resize(std::min(nucleus(x, ids, top, filters, whole), ids.size()));
  }
  return ids;
}

}  // namespace

Greatest greatest(const RowWorkers& workers, const float* x, std::size_t n) {
  const std::vector<float> tops = maxima(workers, x, n);
  const float top = greatest_of(tops);
  const auto piece = static_cast<std::size_t>(std::find(tops.begin(), tops.end(), top) - tops.begin());
  const float* found = piece < tops.size() ? std::find(x + piece * kTopPiece, x + n, top) : x + n;
  // Nowhere if the row has NaN, or another thread writes to it.
  return {std::min(static_cast<std::size_t>(found - x), n - 1), top};
}

double log_sum_exp(const RowWorkers& workers, const float* x, std::size_t n, float top) {
  return static_cast<double>(top) + std::log(sum_exp(workers, x, n, top, 1.0f));
}

void log_softmax(const RowWorkers& workers, const float* x, std::size_t n, double normalizer, float* out) {
  each_piece(workers, n, kRowPiece, [&](std::size_t, std::size_t first, std::size_t count) {
    workers.kernels.row_shift(x + first, count, normalizer, out + first);
  });
}

std::vector<int32_t> best(const RowWorkers& workers, const float* x, std::size_t n, std::size_t k) {
  if (k == 0) return {};
  const std::vector<float> tops = maxima(workers, x, n);
  if (std::isnan(greatest_of(tops))) throw std::invalid_argument("a row with NaN has no order");
  if (k >= n) {
    std::vector<int32_t> ids(n);
    std::iota(ids.begin(), ids.end(), 0);
    return sorted(x, ids);
  }
  float threshold = -INFINITY;  // at least k of those seen are as high: later ones must be above it
  float floor = -INFINITY;      // at least k of all are as high
  if (k <= tops.size()) {
    std::vector<float> highest = tops;
    const auto kth = highest.begin() + static_cast<std::ptrdiff_t>(k - 1);
    std::nth_element(highest.begin(), kth, highest.end(), std::greater<>());
    floor = *kth;
    threshold = std::nextafter(floor, -INFINITY);
  }
  std::vector<Ranked> kept;
  kept.reserve(2 * k + 2 * kScan);
  const auto cut = [&] {
    std::nth_element(kept.begin(), kept.begin() + static_cast<std::ptrdiff_t>(k - 1), kept.end(), before);
    kept.resize(k);
    threshold = kept[k - 1].value;
  };
  int32_t found[kTopPiece];
  for (std::size_t first = 0; first < n; first += kTopPiece) {
    if (tops[first / kTopPiece] < floor) continue;
    const std::size_t last = std::min(first + kTopPiece, n);
    std::size_t count = last - first;
    if (threshold == -INFINITY) {  // also tokens that cannot be drawn: k are asked for
      std::iota(found, found + count, static_cast<int32_t>(first));
    } else {
      count = workers.kernels.row_above(x, first, last, threshold, found);
    }
    for (std::size_t i = 0; i < count; ++i) kept.push_back(ranked(x, found[i]));
    if (kept.size() > 2 * k + kScan || (threshold == -INFINITY && kept.size() > k)) cut();
  }
  if (kept.size() > k) cut();
  std::sort(kept.begin(), kept.end(), before);
  return ids_of(kept);
}

std::size_t draw(const RowWorkers& workers, const float* x, std::size_t n, const Greatest& greatest,
                 const Filters& filters, const NoiseKey& key) {
  const auto [start, top] = greatest;
  if (filters.top_k == 0 && filters.top_p >= 1.0 && filters.min_p <= 0.0) {
    return workers.kernels.row_draw(x, n, start, top, filters.temperature, key);
  }
  std::size_t winner = start;
  double highest = -INFINITY;
  for (const int32_t candidate : survivors(workers, x, n, top, filters)) {
    const auto id = static_cast<std::size_t>(candidate);
    const double score = scaled(x, id, top, filters.temperature) + gumbel(key, static_cast<uint32_t>(id));
    if (score > highest || (score == highest && id < winner)) {
      highest = score;
      winner = id;
    }
  }
  return winner;
}

}  // namespace octavo
