// What attention over float and integer K and V have in common: where these lie, what a row sees of a tile, its
// weights, and the states of tiles.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "math.inl"

namespace octavo::OCTAVO_ISA {

alignas(64) constexpr float kLaneNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr std::size_t kRowBlock = 8;  // rows that share one conversion of K and V
constexpr std::size_t kChunks = kTile / kLanes;

// One tile of keys of one sequence.
struct Tile {
  std::size_t start;  // position of its first key
  std::size_t keys;   // how many of its 64 keys are there
  std::size_t lanes;  // keys, rounded up to 16: so many are readable
};

// Where the K and V of a sequence are, of one KV head.
struct Places {
  const KVView& kv;
  const int32_t* table;
  std::size_t kv_head;
  std::size_t k_head_bytes, v_head_bytes;
  const int32_t* tail;
  std::size_t tail_start;

  // Number of the KV head of a block, and of the block of a position; where its K and V begin.
  OCTAVO_INLINE std::size_t head_of(std::size_t block) const { return block * kv.kv_heads + kv_head; }
  OCTAVO_INLINE std::size_t head_at(std::size_t position) const {
    return head_of(static_cast<std::size_t>(table[position / kv.block_size]));
  }
  OCTAVO_INLINE const uint8_t* k_of(std::size_t head) const { return kv.k + head * k_head_bytes; }
  OCTAVO_INLINE const uint8_t* v_of(std::size_t head) const { return kv.v + head * v_head_bytes; }
  OCTAVO_INLINE std::size_t slot_of(std::size_t position) const {
    if (position >= tail_start) return static_cast<std::size_t>(tail[position - tail_start]);
    return static_cast<std::size_t>(table[position / kv.block_size]) * kv.block_size + position % kv.block_size;
  }
  // Whether some keys of the tile are those of a draft tree: they lie anywhere.
  OCTAVO_INLINE bool in_tail(const Tile& tile) const { return tile.start + tile.keys > tail_start; }
  // Where 16 keys from `position` on begin inside a block.
  OCTAVO_INLINE std::size_t offset(std::size_t position) const { return position % kv.block_size; }

  // The head that is wanted after that of `position`, one tile further on or, behind `last`, at the beginning of the
  // next KV head, which is as a rule the next piece of work. For a guess, so that it need not be right.
  OCTAVO_INLINE std::size_t head_after(std::size_t position, std::size_t first, std::size_t last) const {
    if (position + kTile <= last) return head_at(position + kTile);
    return head_at(first + position % kTile) + (kv_head + 1 < kv.kv_heads ? 1 : 0);
  }

  // Ask for the K and V of the blocks of [first, last) ahead of their use.
  void prefetch(std::size_t first, std::size_t last) const {
    for (std::size_t position = first; position < last; position += kv.block_size) {
      const std::size_t head = head_at(position);
      for (std::size_t byte = 0; byte < k_head_bytes; byte += 64) __builtin_prefetch(k_of(head) + byte);
      for (std::size_t byte = 0; byte < v_head_bytes; byte += 64) __builtin_prefetch(v_of(head) + byte);
    }
  }
};

// What one query vector has so far, and its place in a block of rows.
struct Query {
  const float* q;
  std::size_t lowest, limit;  // it sees positions [lowest, limit)
  float* state;               // max, sum, out [D]
  float* tile;                // the same of one tile
  bool begun;
};

// Keys [first, last) of a tile that a query sees.
OCTAVO_INLINE void seen(const Query& query, const Tile& tile, std::size_t& first, std::size_t& last) {
  first = query.lowest > tile.start ? query.lowest - tile.start : 0;
  last = query.limit > tile.start ? std::min(query.limit - tile.start, tile.keys) : 0;
}

// Scores [64], scaled; those of keys outside [first, last) are -inf. The greatest of each lane.
OCTAVO_INLINE F scale_scores(const float* scores, std::size_t first, std::size_t last, float scale, F* chunk) {
  for (std::size_t c = 0; c < kChunks; ++c) chunk[c] = mul(load(scores + c * kLanes), set1(scale));
  if (first > 0 || last < kTile) {
    const F lane = load(kLaneNumbers);
    for (std::size_t c = 0; c < kChunks; ++c) {
      const F number = add(lane, set1(static_cast<float>(c * kLanes)));
      chunk[c] = select_less(number, set1(static_cast<float>(first)), set1(-INFINITY), chunk[c]);
      chunk[c] = select_less(number, set1(static_cast<float>(last)), chunk[c], set1(-INFINITY));
    }
  }
  F top = set1(-INFINITY);
  for (std::size_t c = 0; c < kChunks; ++c) top = max(chunk[c], top);
  return top;
}

// Scaled scores to weights, by e^x; the sums of the lanes.
template <class Exp>
OCTAVO_INLINE F soften(F* chunk, float highest, const Exp& e_to_the) {
  for (std::size_t c = 0; c < kChunks; ++c) chunk[c] = e_to_the(sub(chunk[c], set1(highest)));
  return add(add(chunk[0], chunk[1]), add(chunk[2], chunk[3]));
}

// So many states are folded at once: their weights are one exp.
constexpr std::size_t kFolds = kLanes / 2;

// Max and sum of states folded with those of tiles; weights [16]: of what each state has, and of its tile.
OCTAVO_INLINE void fold_sums(float* const* states, const float* const* tiles, std::size_t count, float* weights) {
  std::fill(weights, weights + kLanes, 0.0f);
  for (std::size_t i = 0; i < count; ++i) {
    const float top = tiles[i][0] > states[i][0] ? tiles[i][0] : states[i][0];
    weights[2 * i] = states[i][0] - top;
    weights[2 * i + 1] = tiles[i][0] - top;
    states[i][0] = top;
  }
  store(weights, exp(load(weights)));
  for (std::size_t i = 0; i < count; ++i) {
    states[i][1] = std::fma(tiles[i][1], weights[2 * i + 1], states[i][1] * weights[2 * i]);
  }
}

// states[i] <- states[i] folded with tiles[i]: (max, sum, out).
OCTAVO_INLINE void fold_some(float* const* states, const float* const* tiles, std::size_t count, std::size_t head_dim) {
  alignas(64) float weights[kLanes];
  fold_sums(states, tiles, count, weights);
  for (std::size_t i = 0; i < count; ++i) {
    float* state = states[i];
    const float* tile = tiles[i];
    const F old = set1(weights[2 * i]);
    const F now = set1(weights[2 * i + 1]);
    for (std::size_t d = 0; d < head_dim; d += kLanes) {
      store(state + 2 + d, fma(load(tile + 2 + d), now, mul(load(state + 2 + d), old)));
    }
  }
}

OCTAVO_INLINE void finish_state(const float* state, std::size_t head_dim, float* out) {
  const F sum = set1(state[1]);
  for (std::size_t d = 0; d < head_dim; d += kLanes) store(out + d, div(load(state + 2 + d), sum));
}

void fold(float* states, std::size_t tiles, std::size_t group, std::size_t head_dim, float* out) {
  const std::size_t size = 2 + head_dim;
  for (std::size_t first = 0; first < group; first += kFolds) {
    const std::size_t count = std::min(kFolds, group - first);
    float* into[kFolds];  // the first tile's
    const float* tile[kFolds];
    for (std::size_t i = 0; i < count; ++i) into[i] = states + (first + i) * size;
    for (std::size_t t = 1; t < tiles; ++t) {
      for (std::size_t i = 0; i < count; ++i) tile[i] = states + (t * group + first + i) * size;
      fold_some(into, tile, count, head_dim);
    }
    for (std::size_t i = 0; i < count; ++i) finish_state(into[i], head_dim, out + (first + i) * head_dim);
  }
}

}  // namespace octavo::OCTAVO_ISA
