// Attention of rows of one sequence over its stored K and V, for one KV head and the query heads that share it.
//
// Keys are visited in tiles of 64 by logical position. A tile starts from the empty state and gives (max, sum, out); a
// row folds its tiles left to right. Scores sum over head_dim ascending with keys in lanes, out sums over keys
// ascending, the denominator by a fixed tree. A key that a row may not see has score -inf and its V is never
// multiplied. So a row's result depends on its query and the keys it sees, not on other rows, on block size or on who
// computes which tile.
#pragma once

#include <algorithm>

#include "elementwise.inl"
#include "kernels.h"
#include "math.inl"

namespace octavo::OCTAVO_ISA {

#if defined(__AVX512F__)
constexpr std::size_t kQueryTile = 8;   // query vectors at a time, when there are many
constexpr std::size_t kChunksMany = 2;  // of 16 columns, with so many queries
constexpr std::size_t kChunksFew = 4;
constexpr std::size_t kMostInPlace = SIZE_MAX;  // queries for which K and V are converted each time they are read
#elif defined(__AVX2__)
constexpr std::size_t kQueryTile = 4;
constexpr std::size_t kChunksMany = 1;
constexpr std::size_t kChunksFew = 2;
constexpr std::size_t kMostInPlace = SIZE_MAX;
#else
constexpr std::size_t kQueryTile = 2;
constexpr std::size_t kChunksMany = 1;
constexpr std::size_t kChunksFew = 1;
constexpr std::size_t kMostInPlace = kQueryTile;
#endif
alignas(64) constexpr float kLaneNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr std::size_t kRowBlock = 8;  // rows that share one conversion of K and V
constexpr std::size_t kChunks = kTile / kLanes;

// B of the product below: rows of floats or halves. Halves are read where they are stored: while row i is used, `ahead`
// asks for row i of the next tile. Blocks lie anywhere, so that the processor cannot guess the next one, and asking for
// a whole tile at once would fill its queues.
struct Floats {
  const float* p;
  std::size_t stride;
  OCTAVO_INLINE F at(std::size_t i, std::size_t c) const { return load(p + i * stride + c); }
  OCTAVO_INLINE void ahead(std::size_t, std::size_t) const {}
  OCTAVO_INLINE Floats columns(std::size_t c) const { return {p + c, stride}; }
};
// K of a tile, whose keys are in several blocks: every 16 columns lie elsewhere.
struct HalfKeys {
  const uint16_t* const* p;
  const uint16_t* const* next;
  std::size_t stride;
  OCTAVO_INLINE F at(std::size_t i, std::size_t c) const { return load_half(p[c / kLanes] + i * stride); }
  OCTAVO_INLINE void ahead(std::size_t i, std::size_t c) const {
    __builtin_prefetch(next[c / kLanes] + i * stride, 0, 2);
  }
  OCTAVO_INLINE HalfKeys columns(std::size_t c) const { return {p + c / kLanes, next + c / kLanes, stride}; }
};
// V of a tile: every 16 rows lie elsewhere.
struct HalfValues {
  const uint16_t* const* p;
  const uint16_t* const* next;
  std::size_t stride;
  std::size_t column = 0;
  OCTAVO_INLINE F at(std::size_t i, std::size_t c) const {
    return load_half(p[i / kLanes] + i % kLanes * stride + column + c);
  }
  OCTAVO_INLINE void ahead(std::size_t i, std::size_t c) const {
    if (c % 32 == 0) __builtin_prefetch(next[i / kLanes] + i % kLanes * stride + column + c, 0, 2);
  }
  OCTAVO_INLINE HalfValues columns(std::size_t c) const { return {p, next, stride, column + c}; }
};

// C[q][0 .. 16 * Chunks) (+)= sum over i in [begin, end), ascending, of a[q][i] * B[i].
template <std::size_t Queries, std::size_t Chunks, class B>
OCTAVO_INLINE void product(const float* const* a, const B& b, std::size_t begin, std::size_t end, bool go_on,
                           float* const* c, std::size_t column) {
  constexpr std::size_t kCount = Queries * Chunks;  // [Queries][Chunks]
  F acc[kCount];
  unroll<kCount>(OCTAVO_EACH(n) { acc[n] = go_on ? load(c[n / Chunks] + column + kLanes * (n % Chunks)) : zero(); });
  for (std::size_t i = begin; i < end; ++i) {
    F row[Chunks];
    unroll<Chunks>(OCTAVO_EACH(j) { b.ahead(i, kLanes * j); });
    unroll<Chunks>(OCTAVO_EACH(j) { row[j] = b.at(i, kLanes * j); });
    unroll<Queries>(OCTAVO_EACH(q) {
      const F weight = set1(a[q][i]);
      unroll<Chunks>(OCTAVO_EACH(j) { acc[q * Chunks + j] = fma(weight, row[j], acc[q * Chunks + j]); });
    });
  }
  unroll<kCount>(OCTAVO_EACH(n) { store(c[n / Chunks] + column + kLanes * (n % Chunks), acc[n]); });
}

template <std::size_t Queries, class B>
OCTAVO_INLINE void product_columns(const float* const* a, const B& b, std::size_t begin, std::size_t end, bool go_on,
                                   float* const* c, std::size_t from, std::size_t columns) {
  constexpr std::size_t kMany = Queries > 4 ? kChunksMany : kChunksFew;
  std::size_t at = 0;
  for (; at + kMany * kLanes <= columns; at += kMany * kLanes) {
    product<Queries, kMany>(a, b.columns(at), begin, end, go_on, c, from + at);
  }
  for (; at < columns; at += kLanes) product<Queries, 1>(a, b.columns(at), begin, end, go_on, c, from + at);
}

// Columns are a multiple of 16.
template <class B>
void product_all(const float* const* a, std::size_t queries, const B& b, std::size_t begin, std::size_t end, bool go_on,
                 float* const* c, std::size_t from, std::size_t columns) {
  std::size_t q = 0;
  for (; q + kQueryTile <= queries; q += kQueryTile) {
    product_columns<kQueryTile>(a + q, b, begin, end, go_on, c + q, from, columns);
  }
  switch (queries - q) {
    case 7:
      product_columns<4>(a + q, b, begin, end, go_on, c + q, from, columns);
      q += 4;
      [[fallthrough]];
    case 3:
      product_columns<3>(a + q, b, begin, end, go_on, c + q, from, columns);
      break;
    case 6:
      product_columns<4>(a + q, b, begin, end, go_on, c + q, from, columns);
      q += 4;
      [[fallthrough]];
    case 2:
      product_columns<2>(a + q, b, begin, end, go_on, c + q, from, columns);
      break;
    case 5:
      product_columns<4>(a + q, b, begin, end, go_on, c + q, from, columns);
      q += 4;
      [[fallthrough]];
    case 1:
      product_columns<1>(a + q, b, begin, end, go_on, c + q, from, columns);
      break;
    case 4:
      product_columns<4>(a + q, b, begin, end, go_on, c + q, from, columns);
      break;
    default:
      break;
  }
}

// One tile of keys of one sequence.
struct Tile {
  std::size_t start;  // position of its first key
  std::size_t keys;   // how many of its 64 keys are there
  std::size_t lanes;  // keys, rounded up to 16: so many are readable
};

// Addresses and conversions of one tile's K and V.
struct TileReader {
  const KVView& kv;
  const int32_t* table;
  std::size_t kv_head;
  std::size_t head_bytes;
  const int32_t* tail;
  std::size_t tail_start;

  OCTAVO_INLINE std::size_t base_of(std::size_t block) const { return (block * kv.kv_heads + kv_head) * head_bytes; }
  OCTAVO_INLINE std::size_t base(std::size_t position) const {
    return base_of(static_cast<std::size_t>(table[position / kv.block_size]));
  }
  OCTAVO_INLINE std::size_t slot_of(std::size_t position) const {
    if (position >= tail_start) return static_cast<std::size_t>(tail[position - tail_start]);
    return static_cast<std::size_t>(table[position / kv.block_size]) * kv.block_size + position % kv.block_size;
  }
  // Whether some keys of the tile are those of a draft tree: they lie anywhere.
  OCTAVO_INLINE bool in_tail(const Tile& tile) const { return tile.start + tile.keys > tail_start; }
  // Where 16 keys from `position` on begin inside a block.
  OCTAVO_INLINE std::size_t offset(std::size_t position) const { return position % kv.block_size; }

  OCTAVO_INLINE const uint16_t* halves(const uint8_t* k_or_v, std::size_t base) const {
    return reinterpret_cast<const uint16_t*>(k_or_v + base);
  }
  // The block that is wanted after that of `position`, one tile further on or, behind `last`, at the beginning of the
  // next KV head, which is as a rule the next piece of work. For a guess, so that it need not be right.
  OCTAVO_INLINE std::size_t base_after(std::size_t position, std::size_t first, std::size_t last) const {
    if (position + kTile <= last) return base(position + kTile);
    return base(first + position % kTile) + (kv_head + 1 < kv.kv_heads ? head_bytes : 0);
  }

  // Ask for the K and V of the blocks of [first, last) ahead of their use.
  void prefetch(std::size_t first, std::size_t last) const {
    for (std::size_t position = first; position < last; position += kv.block_size) {
      const std::size_t at = base(position);
      for (std::size_t byte = 0; byte < head_bytes; byte += 64) {
        __builtin_prefetch(kv.k + at + byte);
        __builtin_prefetch(kv.v + at + byte);
      }
    }
  }

  // K of the tile as float32 [D][64].
  void keys(const Tile& tile, float* out) const {
    if (in_tail(tile)) return gathered_keys(tile, out);
    for (std::size_t key = 0; key < tile.lanes; key += kLanes) {
      const std::size_t at = offset(tile.start + key);
      const uint8_t* head = kv.k + base(tile.start + key);
      each_scaled([&](std::size_t first, std::size_t last) {
        const F scale = scales(head, first, at);
        for (std::size_t d = first; d < last; ++d) {
          store(out + d * kTile + key, sixteen(head, d * kv.block_size + at, scale));
        }
      });
    }
  }
  // V of the tile as float32 [64][D].
  void values(const Tile& tile, float* out) const {
    for (std::size_t key = 0; key < tile.keys; ++key) {
      const std::size_t slot = slot_of(tile.start + key);
      const std::size_t at = slot % kv.block_size;
      const uint8_t* head = kv.v + base_of(slot / kv.block_size);
      each_scaled([&](std::size_t first, std::size_t last) {
        float scale = 0.0f;
        if (kv.type == KVType::I8) std::memcpy(&scale, head + kv.scale_at(first, at), sizeof scale);
        for (std::size_t d = first; d < last; d += kLanes) {
          store(out + key * kv.head_dim + d, sixteen(head, at * kv.head_dim + d, set1(scale)));
        }
      });
    }
  }

 private:
  // Visits the values of a token in runs that share a scale: visit(first, last).
  template <class Visit>
  OCTAVO_INLINE void each_scaled(const Visit& visit) const {
    for (std::size_t first = 0; first < kv.head_dim; first += KVView::kScaled) {
      visit(first, first + KVView::kScaled < kv.head_dim ? first + KVView::kScaled : kv.head_dim);
    }
  }
  // Of the value d of 16 keys.
  OCTAVO_INLINE F scales(const uint8_t* head, std::size_t d, std::size_t at) const {
    return kv.type == KVType::I8 ? load(reinterpret_cast<const float*>(head + kv.scale_at(d, at))) : zero();
  }
  // Key by key; the same values as sixteen at a time.
  void gathered_keys(const Tile& tile, float* out) const {
    for (std::size_t d = 0; d < kv.head_dim; ++d) std::fill(out + d * kTile, out + d * kTile + tile.lanes, 0.0f);
    for (std::size_t key = 0; key < tile.keys; ++key) {
      const std::size_t slot = slot_of(tile.start + key);
      const std::size_t at = slot % kv.block_size;
      const uint8_t* head = kv.k + base_of(slot / kv.block_size);
      // A block has K transposed: 16 keys of one d lie together, of which one is taken.
      const std::size_t lane = at % kLanes;
      for (std::size_t d = 0; d < kv.head_dim; ++d) {
        alignas(64) float lanes[kLanes];
        store(lanes, sixteen(head, d * kv.block_size + at - lane, scales(head, d, at - lane)));
        out[d * kTile + key] = lanes[lane];
      }
    }
  }
  OCTAVO_INLINE F sixteen(const uint8_t* head, std::size_t index, F scale) const {
    if (kv.type == KVType::F32) return load(reinterpret_cast<const float*>(head) + index);
    if (kv.type == KVType::F16) return load_half(reinterpret_cast<const uint16_t*>(head) + index);
    return mul(load_i8(reinterpret_cast<const int8_t*>(head) + index), scale);
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

// Scores [64] to weights in place; max and sum of the tile.
OCTAVO_INLINE void soften(float* scores, std::size_t first, std::size_t last, float scale, float* max_and_sum) {
  F chunk[kChunks];
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
  const float highest_score = highest_of(top);
  for (std::size_t c = 0; c < kChunks; ++c) {
    chunk[c] = exp(sub(chunk[c], set1(highest_score)));
    store(scores + c * kLanes, chunk[c]);
  }
  max_and_sum[0] = highest_score;
  max_and_sum[1] = sum_of(add(add(chunk[0], chunk[1]), add(chunk[2], chunk[3])));
}

// states[i] <- states[i] folded with tiles[i]: (max, sum, out). The weights of several are one exp.
constexpr std::size_t kFolds = kLanes / 2;

OCTAVO_INLINE void fold_some(float* const* states, const float* const* tiles, std::size_t count, std::size_t head_dim) {
  alignas(64) float weights[kLanes] = {};
  for (std::size_t i = 0; i < count; ++i) {
    const float top = tiles[i][0] > states[i][0] ? tiles[i][0] : states[i][0];
    weights[2 * i] = states[i][0] - top;
    weights[2 * i + 1] = tiles[i][0] - top;
    states[i][0] = top;
  }
  store(weights, exp(load(weights)));
  for (std::size_t i = 0; i < count; ++i) {
    float* state = states[i];
    const float* tile = tiles[i];
    const F old = set1(weights[2 * i]);
    const F now = set1(weights[2 * i + 1]);
    state[1] = std::fma(tile[1], weights[2 * i + 1], state[1] * weights[2 * i]);
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

std::size_t attention_scratch(std::size_t head_dim, std::size_t group) {
  const std::size_t queries = kRowBlock * group;
  return 2 * kTile * head_dim + queries * (kTile + 2 * (2 + head_dim));
}

// One tile for a block of queries: scores, weights and out of each query that sees some of it, into its `tile`.
// The queries see positions from `first_tile` on, and none above `last_position`.
template <bool Convert>
void one_tile(const AttentionPiece& piece, const TileReader& reader, const Tile& tile, const Query* queries,
              std::size_t count, std::size_t first_tile, std::size_t last_position, float* keys, float* values,
              float* scores) {
  const std::size_t dim = piece.kv.head_dim;
  const float* a[kRowBlock * 64];
  float* c[kRowBlock * 64];
  for (std::size_t i = 0; i < count; ++i) {
    a[i] = queries[i].q;
    c[i] = scores + i * kTile;
  }
  // Of each 16 keys, here and a tile further on. 16 keys never lie in two blocks.
  const uint16_t *k[kChunks], *next_k[kChunks], *v[kChunks], *next_v[kChunks];
  if constexpr (Convert) {
    reader.keys(tile, keys);
    product_all(a, count, Floats{keys, kTile}, 0, dim, false, c, 0, tile.lanes);
  } else {
    for (std::size_t chunk = 0; chunk < tile.lanes / kLanes; ++chunk) {
      const std::size_t position = tile.start + chunk * kLanes;
      const std::size_t at = reader.offset(position);
      const std::size_t here = reader.base(position);
      const std::size_t then = reader.base_after(position, first_tile * kTile, last_position);
      k[chunk] = reader.halves(piece.kv.k, here) + at;
      next_k[chunk] = reader.halves(piece.kv.k, then) + at;
      v[chunk] = reader.halves(piece.kv.v, here) + at * dim;
      next_v[chunk] = reader.halves(piece.kv.v, then) + at * dim;
    }
    product_all(a, count, HalfKeys{k, next_k, piece.kv.block_size}, 0, dim, false, c, 0, tile.lanes);
  }
  std::size_t common_first = 0;
  std::size_t lowest_first = SIZE_MAX;
  std::size_t common_last = tile.keys;
  for (std::size_t i = 0; i < count; ++i) {
    std::size_t first, last;
    seen(queries[i], tile, first, last);
    if (first >= last) {
      common_last = 0;
      continue;
    }
    std::fill(c[i] + tile.lanes, c[i] + kTile, 0.0f);
    soften(c[i], first, last, piece.scale, queries[i].tile);
    common_first = std::max(common_first, first);
    lowest_first = std::min(lowest_first, first);
    common_last = std::min(common_last, last);
  }
  for (std::size_t i = 0; i < count; ++i) {
    a[i] = scores + i * kTile;
    c[i] = queries[i].tile + 2;
  }
  // Keys that every query sees are done together; what only some see, before and after, one query at a time.
  const auto span = [&](std::size_t from, std::size_t queries_here, std::size_t begin, std::size_t end, bool go_on) {
    if constexpr (Convert) {
      product_all(a + from, queries_here, Floats{values, dim}, begin, end, go_on, c + from, 0, dim);
    } else {
      product_all(a + from, queries_here, HalfValues{v, next_v, dim}, begin, end, go_on, c + from, 0, dim);
    }
  };
  if constexpr (Convert) reader.values(tile, values);
  const bool together = common_first < common_last;
  const bool go_on = together && common_first > lowest_first;
  if (!together || go_on) {
    for (std::size_t i = 0; i < count; ++i) {
      std::size_t first, last;
      seen(queries[i], tile, first, last);
      if (first >= last) continue;
      if (!together) {
        span(i, 1, first, last, false);
      } else if (first < common_first) {
        span(i, 1, first, common_first, false);
      } else {
        std::fill(c[i], c[i] + dim, 0.0f);
      }
    }
  }
  if (!together) return;
  span(0, count, common_first, common_last, go_on);
  for (std::size_t i = 0; i < count; ++i) {
    std::size_t first, last;
    seen(queries[i], tile, first, last);
    if (last > common_last) span(i, 1, common_last, last, true);
  }
}

void attention(const AttentionPiece& piece, float* scratch) {
  const std::size_t dim = piece.kv.head_dim;
  const std::size_t size = 2 + dim;
  const std::size_t group = piece.heads / piece.kv.kv_heads;
  float* keys = scratch;
  float* values = keys + kTile * dim;
  float* scores = values + kTile * dim;
  float* states = scores + kRowBlock * group * kTile;
  float* tile_states = states + kRowBlock * group * size;
  const TileReader reader{piece.kv,   piece.block_table, piece.kv_head, piece.kv.head_bytes(),
                          piece.tail, piece.tail_start};
  const bool split = piece.last_tile != 0;
  Query queries[kRowBlock * 64];
  for (std::size_t row = 0; row < piece.num_rows; row += kRowBlock) {
    const std::size_t rows = std::min(kRowBlock, piece.num_rows - row);
    const std::size_t count = rows * group;
    std::size_t lowest = SIZE_MAX;
    std::size_t limit = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const auto r = static_cast<std::size_t>(piece.rows[row + i / group]);
      const auto position = static_cast<std::size_t>(piece.positions[r]);
      const auto window = static_cast<std::size_t>(piece.window);
      const std::size_t head = piece.kv_head * group + i % group;
      queries[i] = {piece.q + r * piece.q_stride + head * dim,
                    window != 0 && position >= window ? position - window + 1 : 0,
                    position + 1,
                    states + i * size,
                    tile_states + i * size,
                    false};
      lowest = std::min(lowest, queries[i].lowest);
      limit = std::max(limit, queries[i].limit);
    }
    const std::size_t begin = lowest / kTile;
    const std::size_t last_position = std::min(limit, piece.tail_start) - 1;
    std::size_t first_tile = begin;
    std::size_t last_tile = (limit + kTile - 1) / kTile;
    if (split) {
      first_tile = std::max(first_tile, piece.first_tile);
      last_tile = std::min(last_tile, piece.last_tile);
    }
    const bool convert = piece.kv.type != KVType::F16 || count > kMostInPlace;
    for (std::size_t t = first_tile; t < last_tile; ++t) {
      Tile tile{t * kTile, std::min(kTile, limit - t * kTile), 0};
      tile.lanes = (tile.keys + kLanes - 1) / kLanes * kLanes;
      const bool in_place = !convert && !reader.in_tail(tile);
      if (!in_place && t + 1 < last_tile) {
        reader.prefetch(tile.start + kTile, std::min({tile.start + 2 * kTile, limit, piece.tail_start}));
      } else if (in_place && t == first_tile) {
        reader.prefetch(tile.start, tile.start + tile.keys);
      }
      if (split) {
        for (std::size_t i = 0; i < count; ++i) {
          const auto state =
              static_cast<std::size_t>(piece.row_states[row + i / group] + static_cast<std::ptrdiff_t>(t));
          queries[i].tile = piece.states + (state * group + i % group) * size;
        }
      }
      if (in_place) {
        one_tile<false>(piece, reader, tile, queries, count, begin, last_position, keys, values, scores);
      } else {
        one_tile<true>(piece, reader, tile, queries, count, begin, last_position, keys, values, scores);
      }
      if (split) continue;
      float* into[kFolds];
      const float* from[kFolds];
      std::size_t waiting = 0;
      for (std::size_t i = 0; i < count; ++i) {
        std::size_t first, last;
        seen(queries[i], tile, first, last);
        if (first >= last) continue;
        if (!queries[i].begun) {
          std::memcpy(queries[i].state, queries[i].tile, size * sizeof(float));
          queries[i].begun = true;
          continue;
        }
        into[waiting] = queries[i].state;
        from[waiting++] = queries[i].tile;
        if (waiting == kFolds) fold_some(into, from, waiting, dim), waiting = 0;
      }
      if (waiting > 0) fold_some(into, from, waiting, dim);
    }
    if (split) continue;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t head = piece.kv_head * group + i % group;
      const auto r = static_cast<std::size_t>(piece.rows[row + i / group]);
      finish_state(queries[i].state, dim, piece.out + r * piece.heads * dim + head * dim);
    }
  }
}

}  // namespace octavo::OCTAVO_ISA
