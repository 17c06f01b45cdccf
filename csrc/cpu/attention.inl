// Attention of rows of one sequence over its stored K and V, for one KV head and the query heads that share it.
//
// Keys are visited in tiles of 64 by logical position. A tile starts from the empty state and gives (max, sum, out); a
// row folds its tiles left to right. Scores sum over head_dim ascending with keys in lanes, out sums over keys
// ascending, the denominator by a fixed tree. A key that a row may not see has score -inf and its V is never
// multiplied. So a row's result depends on its query and the keys it sees, not on other rows, on block size or on who
// computes which tile.
// Over K and V in int8 the same, with sums of integers: attention_codes.inl.
#pragma once

#include "attention_codes.inl"
#include "attention_state.inl"
#include "elementwise.inl"

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

// K and V of a tile as float32.
struct TileReader : Places {
  OCTAVO_INLINE static const uint16_t* halves(const uint8_t* head) { return reinterpret_cast<const uint16_t*>(head); }
  // K as [D][64].
  void keys(const Tile& tile, float* out) const {
    if (in_tail(tile)) return gathered_keys(tile, out);
    for (std::size_t key = 0; key < tile.lanes; key += kLanes) {
      const std::size_t at = offset(tile.start + key);
      const uint8_t* head = k_of(head_at(tile.start + key));
      for (std::size_t d = 0; d < kv.head_dim; ++d) {
        store(out + d * kTile + key, sixteen(head, d * kv.block_size + at));
      }
    }
  }
  // V as [64][D].
  void values(const Tile& tile, float* out) const {
    for (std::size_t key = 0; key < tile.keys; ++key) {
      const std::size_t slot = slot_of(tile.start + key);
      const std::size_t at = slot % kv.block_size;
      const uint8_t* head = v_of(head_of(slot / kv.block_size));
      for (std::size_t d = 0; d < kv.head_dim; d += kLanes) {
        store(out + key * kv.head_dim + d, sixteen(head, at * kv.head_dim + d));
      }
    }
  }

 private:
  // Key by key; the same values as sixteen at a time.
  void gathered_keys(const Tile& tile, float* out) const {
    for (std::size_t d = 0; d < kv.head_dim; ++d) std::fill(out + d * kTile, out + d * kTile + tile.lanes, 0.0f);
    for (std::size_t key = 0; key < tile.keys; ++key) {
      const std::size_t slot = slot_of(tile.start + key);
      const std::size_t at = slot % kv.block_size;
      const uint8_t* head = k_of(head_of(slot / kv.block_size));
      // A block has K transposed: 16 keys of one d lie together, of which one is taken.
      const std::size_t lane = at % kLanes;
      for (std::size_t d = 0; d < kv.head_dim; ++d) {
        alignas(64) float lanes[kLanes];
        store(lanes, sixteen(head, d * kv.block_size + at - lane));
        out[d * kTile + key] = lanes[lane];
      }
    }
  }
  OCTAVO_INLINE F sixteen(const uint8_t* head, std::size_t index) const {
    if (kv.type == KVType::F32) return load(reinterpret_cast<const float*>(head) + index);
    return load_half(reinterpret_cast<const uint16_t*>(head) + index);
  }
};

std::size_t attention_scratch(std::size_t head_dim, std::size_t group) {
  const std::size_t queries = kRowBlock * group;
  const std::size_t of_floats = 2 * kTile * head_dim + queries * kTile;
  const std::size_t of_codes = (code_scratch_bytes(head_dim, queries) + sizeof(float) - 1) / sizeof(float);
  return std::max(of_floats, of_codes) + queries * 2 * (2 + head_dim);
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
      const std::size_t here = reader.head_at(position);
      const std::size_t then = reader.head_after(position, first_tile * kTile, last_position);
      k[chunk] = reader.halves(reader.k_of(here)) + at;
      next_k[chunk] = reader.halves(reader.k_of(then)) + at;
      v[chunk] = reader.halves(reader.v_of(here)) + at * dim;
      next_v[chunk] = reader.halves(reader.v_of(then)) + at * dim;
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
    F weights[kChunks];
    queries[i].tile[0] = highest_of(scale_scores(c[i], first, last, piece.scale, weights));
    queries[i].tile[1] = sum_of(soften(weights, queries[i].tile[0], [](F x) { return exp(x); }));
    for (std::size_t chunk = 0; chunk < kChunks; ++chunk) store(c[i] + chunk * kLanes, weights[chunk]);
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
  float* states = scratch;
  float* tile_states = states + kRowBlock * group * size;
  float* keys = tile_states + kRowBlock * group * size;
  float* values = keys + kTile * dim;
  float* scores = values + kTile * dim;
  CodeScratch codes = code_scratch(reinterpret_cast<uint8_t*>(keys), dim, kRowBlock * group);
  const TileReader reader{{piece.kv, piece.block_table, piece.kv_head, piece.kv.k_head_bytes(), piece.kv.v_head_bytes(),
                           piece.tail, piece.tail_start}};
  const bool some = piece.last_tile != 0;
  const bool split = some && !piece.folds;
  Query queries[kRowBlock * 64];
  const auto state_at = [&](std::size_t row, std::size_t tile) {
    const auto number = static_cast<std::size_t>(piece.row_states[row] + static_cast<std::ptrdiff_t>(tile));
    return piece.states + number * group * size;
  };
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
                    piece.folds ? state_at(row + i / group, piece.last_tile - 1) + i % group * size : states + i * size,
                    tile_states + i * size,
                    false};
      lowest = std::min(lowest, queries[i].lowest);
      limit = std::max(limit, queries[i].limit);
    }
    const std::size_t begin = lowest / kTile;
    const std::size_t last_position = std::min(limit, piece.tail_start) - 1;
    std::size_t first_tile = begin;
    std::size_t last_tile = (limit + kTile - 1) / kTile;
    if (some) {
      first_tile = std::max(first_tile, piece.first_tile);
      last_tile = std::min(last_tile, piece.last_tile);
    }
    const bool integers = piece.kv.type == KVType::I8;
    if (integers) {
      codes.q.rows = count;
      for (std::size_t i = 0; i < count; ++i) quantize_query(queries[i].q, dim, i, codes.q);
    }
    const bool convert = !integers && (piece.kv.type == KVType::F32 || count > kMostInPlace);
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
          queries[i].tile = state_at(row + i / group, t) + i % group * size;
        }
      }
      if (integers) {
        const bool more = in_place && (t + 1 < last_tile || some);
        const CodeTile next = more ? code_tile_after(reader, tile, begin * kTile, last_position) : CodeTile{};
        const CodeTile here = in_place ? code_tile(reader, tile) : gathered_code_tile(reader, tile, codes.gathered);
        one_tile_of_codes(piece, here, more ? &next : nullptr, tile, queries, count, codes, split);
        continue;
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
    if (some) continue;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t head = piece.kv_head * group + i % group;
      const auto r = static_cast<std::size_t>(piece.rows[row + i / group]);
      finish_state(queries[i].state, dim, piece.out + r * piece.heads * dim + head * dim);
    }
  }
}

}  // namespace octavo::OCTAVO_ISA
