// Regions of the pool, as short and as many as can be: every item is done once, by the time the region ends.
// Arguments: threads, thousands of regions.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "pool.h"

int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]);
  const long end = std::atol(arguments[2]) * 1000;
  octavo::Pool pool(threads);
  octavo::Pool::Session session(pool);
  std::vector<int> times(512);   // not atomic: a second thread on an item is a race that a sanitizer sees
  std::atomic<long> running{0};  // pieces under way
  unsigned random = 1;
  long regions = 0;
  while (regions < end) {
    for (int i = 0; i < 1000; ++i, ++regions) {
      random = random * 1664525u + 1013904223u;
      const std::size_t count = 1 + (random >> 16) % times.size();
      const std::size_t grain = 1 + (random >> 8) % 8;
      pool.parallel(count, grain, [&](std::size_t begin, std::size_t stop, std::size_t thread) {
        running.fetch_add(1, std::memory_order_relaxed);
        if (thread >= static_cast<std::size_t>(threads)) std::abort();
        for (std::size_t k = begin; k < stop; ++k) ++times[k];
        running.fetch_sub(1, std::memory_order_relaxed);
      });
      if (running.load() != 0) return std::printf("region %ld ended while pieces ran\n", regions), 1;
      for (std::size_t k = 0; k < times.size(); ++k) {
        if (times[k] != (k < count ? 1 : 0)) {
          return std::printf("region %ld: item %zu of %zu was done %d times\n", regions, k, count, times[k]), 1;
        }
        times[k] = 0;
      }
    }
  }
  std::printf("%ld regions\n", regions);
  return 0;
}
