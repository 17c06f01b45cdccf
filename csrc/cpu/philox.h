// Counter-based noise, as octavo.sampling.noise has it: Philox4x32-10 (Salmon et al., SC 2011), keyed by seed, stream
// and position; token t takes word t % 4 of counter t / 4.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace octavo {

struct NoiseKey {
  uint32_t seed_low, seed_high, path_low, path_high, position;
};

inline void philox(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c[0]} * 0xD2511F53u;
    const uint64_t p1 = uint64_t{c[2]} * 0xCD9E8D57u;
    const uint32_t a = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    const uint32_t b = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[1] = static_cast<uint32_t>(p1);
    c[3] = static_cast<uint32_t>(p0);
    c[0] = a;
    c[2] = b;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// 64 bits that stand for a path of integers.
inline uint64_t stream_id(uint64_t seed, const std::vector<uint64_t>& stream) {
  uint64_t state = stream.size();
  for (const uint64_t step : stream) {
    uint32_t c[4] = {static_cast<uint32_t>(state), static_cast<uint32_t>(state >> 32), static_cast<uint32_t>(step),
                     static_cast<uint32_t>(step >> 32)};
    philox(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    state = c[0] | uint64_t{c[1]} << 32;
  }
  return state;
}

// Standard Gumbel noise of one token.
inline double gumbel(const NoiseKey& key, uint32_t token) {
  uint32_t c[4] = {token / 4, key.position, key.path_low, key.path_high};
  philox(c, key.seed_low, key.seed_high);
  const double u = (static_cast<double>(c[token % 4]) + 0.5) * 0x1p-32;
  return -std::log(-std::log(u));
}

// Words of N counters from `first` on: words[w][i] of token 4 * (first + i) + w. In columns, so that compilers use
// lanes.
template <std::size_t N>
inline void philox_groups(const NoiseKey& key, uint32_t first, uint32_t (&words)[4][N]) {
  for (std::size_t i = 0; i < N; ++i) {
    words[0][i] = first + static_cast<uint32_t>(i);
    words[1][i] = key.position;
    words[2][i] = key.path_low;
    words[3][i] = key.path_high;
  }
  uint32_t k0 = key.seed_low;
  uint32_t k1 = key.seed_high;
  for (int round = 0; round < 10; ++round) {
    for (std::size_t i = 0; i < N; ++i) {
      const uint64_t p0 = uint64_t{words[0][i]} * 0xD2511F53u;
      const uint64_t p1 = uint64_t{words[2][i]} * 0xCD9E8D57u;
      words[0][i] = static_cast<uint32_t>(p1 >> 32) ^ words[1][i] ^ k0;
      words[2][i] = static_cast<uint32_t>(p0 >> 32) ^ words[3][i] ^ k1;
      words[1][i] = static_cast<uint32_t>(p1);
      words[3][i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace octavo
