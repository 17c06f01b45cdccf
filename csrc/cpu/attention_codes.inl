// Attention over K and V in int8: sums of products of codes are exact integers, whatever the instructions.
//
// Queries are quantised as activations are, per 32 values; a score is the sum over these, ascending, of the integer sum
// times the key's scale times the query's. The weights of a tile's keys take in the scales of their values, and are
// quantised to 8 bits by the greatest of the tile; so what a row gets depends on its query and the keys it sees alone.
#pragma once

#include "attention_state.inl"
#include "linear.inl"

namespace octavo::OCTAVO_ISA {

constexpr std::size_t kKeysOfQuad = 4;
constexpr float kWeightTop = 255.0f;  // the greatest weight's code

// Where a tile's K and V are, for every 16 keys. K as bytes, each 128 more than its code: of quad i of dimensions at
// k + i * k_stride, four of each of 16 keys. V as int8: of quad j of keys at v + j * v_stride, four of each dimension.
struct CodeTile {
  const uint8_t* k[kChunks];
  const uint8_t* v[kChunks];
  const float* k_scales[kChunks];  // of 16 keys; of the next 32 dimensions k_scale_stride further on
  const float* v_scales[kChunks];
  std::size_t k_stride, v_stride, k_scale_stride;

  // Where in v[key / 16] the codes of four keys and 16 dimensions from d on begin.
  OCTAVO_INLINE std::size_t v_at(std::size_t key, std::size_t d) const {
    return key % kLanes / kKeysOfQuad * v_stride + kKeysOfQuad * d;
  }
};

// `head_of(chunk)`: number of the KV head of the block with these 16 keys.
template <class HeadOf>
OCTAVO_INLINE CodeTile code_tile_of(const Places& places, const Tile& tile, const HeadOf& head_of) {
  const KVView& kv = places.kv;
  CodeTile made;
  made.k_stride = kKeysOfQuad * kv.block_size;
  made.v_stride = kKeysOfQuad * kv.head_dim;
  made.k_scale_stride = kv.block_size;
  for (std::size_t chunk = 0; chunk < tile.lanes / kLanes; ++chunk) {
    const std::size_t at = places.offset(tile.start + chunk * kLanes);
    const uint8_t* k = places.k_of(head_of(chunk));
    const uint8_t* v = places.v_of(head_of(chunk));
    made.k[chunk] = k + 4 * at;
    made.v[chunk] = v + at * kv.head_dim;
    made.k_scales[chunk] = reinterpret_cast<const float*>(k + kv.k_scale_at(0, at));
    made.v_scales[chunk] = reinterpret_cast<const float*>(v + kv.v_scale_at(at));
  }
  return made;
}

OCTAVO_INLINE CodeTile code_tile(const Places& places, const Tile& tile) {
  return code_tile_of(places, tile, [&](std::size_t chunk) { return places.head_at(tile.start + chunk * kLanes); });
}

// The next tile, or what is likely to be wanted next. See Places::head_after.
OCTAVO_INLINE CodeTile code_tile_after(const Places& places, const Tile& tile, std::size_t first, std::size_t last) {
  return code_tile_of(places, tile,
                      [&](std::size_t chunk) { return places.head_after(tile.start + chunk * kLanes, first, last); });
}

// A tile whose keys lie anywhere, copied together as in a block of 64.
inline CodeTile gathered_code_tile(const Places& places, const Tile& tile, uint8_t* room) {
  const KVView& kv = places.kv;
  const std::size_t dim = kv.head_dim;
  const std::size_t groups = (dim + KVView::kScaled - 1) / KVView::kScaled;
  uint8_t* k = room;
  uint8_t* v = k + kTile * dim;
  auto* k_scales = reinterpret_cast<float*>(v + kTile * dim);
  float* v_scales = k_scales + kTile * groups;
  std::fill(k_scales, v_scales + kTile, 0.0f);
  std::memset(room, 0, 2 * kTile * dim);
  for (std::size_t key = 0; key < tile.keys; ++key) {
    const std::size_t slot = places.slot_of(tile.start + key);
    const std::size_t at = slot % kv.block_size;
    const uint8_t* k_head = places.k_of(places.head_of(slot / kv.block_size));
    const uint8_t* v_head = places.v_of(places.head_of(slot / kv.block_size));
    for (std::size_t d = 0; d < dim; d += 4) std::memcpy(k + d * kTile + 4 * key, k_head + kv.k_code_at(d, at), 4);
    for (std::size_t d = 0; d < dim; ++d) v[(key / 4 * dim + d) * 4 + key % 4] = v_head[kv.v_code_at(d, at)];
    for (std::size_t g = 0; g < groups; ++g) {
      std::memcpy(k_scales + g * kTile + key, k_head + kv.k_scale_at(g * KVView::kScaled, at), sizeof(float));
    }
    std::memcpy(v_scales + key, v_head + kv.v_scale_at(at), sizeof(float));
  }
  CodeTile made;
  made.k_stride = kKeysOfQuad * kTile;
  made.v_stride = kKeysOfQuad * dim;
  made.k_scale_stride = kTile;
  for (std::size_t chunk = 0; chunk < kChunks; ++chunk) {
    made.k[chunk] = k + 4 * kLanes * chunk;
    made.v[chunk] = v + kLanes * chunk * dim;
    made.k_scales[chunk] = k_scales + kLanes * chunk;
    made.v_scales[chunk] = v_scales + kLanes * chunk;
  }
  return made;
}

// dot_keys: sums[r] lane c = sum of the codes of key c times those of query r, over `quads` quads of dimensions.
// dot_values: sums[r * Chunks + c] lane i = sum over keys of the codes of dimension d + 16 c + i of V times the
// weights' of row r; asks for those of the tile `next`, if it is known. Weights are stored as put_weights does, in rows
// of a tile.

#if defined(__AVX512F__)

using WeightCode = uint8_t;

OCTAVO_INLINE void put_weights(WeightCode* p, I codes) { store_bytes(reinterpret_cast<int8_t*>(p), codes); }

template <std::size_t Rows>
OCTAVO_INLINE void dot_keys(const uint8_t* k, std::size_t stride, std::size_t quads, const int8_t* q,
                            const int32_t* minus_sums, I* sums) {
  __m512i sum[Rows];  // what is too much in each code of K, first
  unroll<Rows>(OCTAVO_EACH(r) { sum[r] = _mm512_slli_epi32(_mm512_set1_epi32(minus_sums[r]), 7); });
  for (std::size_t j = 0; j < quads; ++j) {
    const __m512i code = _mm512_loadu_si512(k + j * stride);
    unroll<Rows>(OCTAVO_EACH(r) { sum[r] = multiply_add(sum[r], code, q + r * kGroup + 4 * j); });
  }
  unroll<Rows>(OCTAVO_EACH(r) { sums[r].v = sum[r]; });
}

// sum + weights * code, in place: GCC would else copy sums from register to register.
OCTAVO_INLINE I weigh(I sum, __m512i weights, __m512i code) {
  asm("vpdpbusd %[c], %[w], %[s]" : [s] "+v"(sum.v) : [w] "v"(weights), [c] "v"(code));
  return sum;
}

template <std::size_t Rows, std::size_t Chunks>
OCTAVO_INLINE void weigh_quad(const uint8_t* v, const WeightCode* p, I* sums) {
  __m512i codes[Chunks];
  unroll<Chunks>(OCTAVO_EACH(c) { codes[c] = _mm512_loadu_si512(v + 64 * c); });
  unroll<Rows>(OCTAVO_EACH(r) {
    const __m512i weights = _mm512_set1_epi32(four_of(reinterpret_cast<const int8_t*>(p + r * kTile)));
    unroll<Chunks>(OCTAVO_EACH(c) { sums[r * Chunks + c] = weigh(sums[r * Chunks + c], weights, codes[c]); });
  });
}

#elif defined(__AVXVNNI__)

using WeightCode = uint8_t;

OCTAVO_INLINE void put_weights(WeightCode* p, I codes) {
  const __m256i words = _mm256_packus_epi32(codes.lo, codes.hi);  // lo 0-3, hi 0-3 | lo 4-7, hi 4-7
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, order)));
}

// At most four rows at a time, whose sums fit the registers.
template <std::size_t Rows>
OCTAVO_INLINE void dot_keys_of_some(const uint8_t* k, std::size_t stride, std::size_t quads, const int8_t* q,
                                    const int32_t* minus_sums, I* sums) {
  Halves sum[Rows];  // what is too much in each code of K, first
  unroll<Rows>(OCTAVO_EACH(r) { sum[r].lo = sum[r].hi = _mm256_slli_epi32(_mm256_set1_epi32(minus_sums[r]), 7); });
  for (std::size_t j = 0; j < quads; ++j) {
    const Q code = load_codes(k + j * stride);
    unroll<Rows>(OCTAVO_EACH(r) { multiply_add(sum[r], code, q + r * kGroup + 4 * j); });
  }
  unroll<Rows>(OCTAVO_EACH(r) { sums[r] = {sum[r].lo, sum[r].hi}; });
}

template <std::size_t Rows>
OCTAVO_INLINE void dot_keys(const uint8_t* k, std::size_t stride, std::size_t quads, const int8_t* q,
                            const int32_t* minus_sums, I* sums) {
  constexpr std::size_t kFours = Rows / 4;
  unroll<kFours>(
      OCTAVO_EACH(i) { dot_keys_of_some<4>(k, stride, quads, q + 4 * i * kGroup, minus_sums + 4 * i, sums + 4 * i); });
  if constexpr (Rows % 4 != 0) {
    constexpr std::size_t kDone = 4 * kFours;
    dot_keys_of_some<Rows % 4>(k, stride, quads, q + kDone * kGroup, minus_sums + kDone, sums + kDone);
  }
}

// sum + the codes of four keys times their weights.
OCTAVO_INLINE __m256i weigh(__m256i sum, __m256i code, const WeightCode* p) {
  __m256i four;
  asm("vpbroadcastd %[w], %[f]\n\t"
      "%{vex%} vpdpbusd %[c], %[f], %[s]"
      : [s] "+&x"(sum), [f] "=&x"(four)
      : [c] "x"(code), [w] "m"(*reinterpret_cast<const WeightCode(*)[4]>(p)));
  return sum;
}

// Half a vector after the other, so that the sums of all rows fit the registers.
template <std::size_t Rows, std::size_t Chunks>
OCTAVO_INLINE void dot_values(const CodeTile& tile, const CodeTile* next, std::size_t keys, std::size_t d,
                              const WeightCode* p, I* sums) {
  unroll<2 * Chunks>(OCTAVO_EACH(part) {
    constexpr std::size_t kChunk = part / 2;
    constexpr std::size_t kHalf = part % 2;
    __m256i sum[Rows];
    unroll<Rows>(OCTAVO_EACH(r) { sum[r] = _mm256_setzero_si256(); });
    for (std::size_t key = 0; key < keys; key += kKeysOfQuad) {
      const std::size_t at = tile.v_at(key, d) + 64 * kChunk;
      if (kHalf == 0 && next != nullptr) __builtin_prefetch(next->v[key / kLanes] + at, 0, 2);
      const auto* codes = reinterpret_cast<const __m256i*>(tile.v[key / kLanes] + at + 32 * kHalf);
      const __m256i code = _mm256_loadu_si256(codes);
      unroll<Rows>(OCTAVO_EACH(r) { sum[r] = weigh(sum[r], code, p + r * kTile + key); });
    }
    unroll<Rows>(OCTAVO_EACH(r) {
      I& whole = sums[r * Chunks + kChunk];
      (kHalf == 0 ? whole.lo : whole.hi) = sum[r];
    });
  });
}

#elif defined(__AVX2__)

// Weights of 8 bits times codes of 8 bits do not fit into int16 by twos, so they are multiplied as int16: of each four
// keys the first and third, then the second and fourth.
using WeightCode = uint16_t;

OCTAVO_INLINE void put_weights(WeightCode* p, I codes) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(codes.lo, codes.hi), 0xd8);
  const __m256i pairs = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pairs);
}

template <std::size_t Rows>
OCTAVO_INLINE void dot_keys(const uint8_t* k, std::size_t stride, std::size_t quads, const int8_t* q, const int32_t*,
                            I* sums) {
  unroll<Rows>(OCTAVO_EACH(r) { sums[r] = set1i(0); });
  dot_signed<Rows>(k, stride, quads, q, sums);
}

// sum + the codes of the first and third of four keys times their weights, and of the second and fourth.
OCTAVO_INLINE __m256i weigh(__m256i sum, __m256i even, __m256i odd, const WeightCode* p) {
  __m256i product;
  asm("vpbroadcastd %[a], %[p]\n\t"
      "vpmaddwd %[p], %[e], %[p]\n\t"
      "vpaddd %[p], %[s], %[s]\n\t"
      "vpbroadcastd %[b], %[p]\n\t"
      "vpmaddwd %[p], %[o], %[p]\n\t"
      "vpaddd %[p], %[s], %[s]"
      : [s] "+&x"(sum), [p] "=&x"(product)
      : [e] "x"(even), [o] "x"(odd), [a] "m"(*reinterpret_cast<const WeightCode(*)[2]>(p)),
        [b] "m"(*reinterpret_cast<const WeightCode(*)[2]>(p + 2)));
  return sum;
}

// Half a vector after the other, so that the sums of all rows fit the registers.
template <std::size_t Rows, std::size_t Chunks>
OCTAVO_INLINE void dot_values(const CodeTile& tile, const CodeTile* next, std::size_t keys, std::size_t d,
                              const WeightCode* p, I* sums) {
  unroll<2 * Chunks>(OCTAVO_EACH(part) {
    constexpr std::size_t kChunk = part / 2;
    constexpr std::size_t kHalf = part % 2;
    __m256i sum[Rows];
    unroll<Rows>(OCTAVO_EACH(r) { sum[r] = _mm256_setzero_si256(); });
    for (std::size_t key = 0; key < keys; key += kKeysOfQuad) {
      const std::size_t at = tile.v_at(key, d) + 64 * kChunk;
      if (kHalf == 0 && next != nullptr) __builtin_prefetch(next->v[key / kLanes] + at, 0, 2);
      const auto* codes = reinterpret_cast<const __m256i*>(tile.v[key / kLanes] + at + 32 * kHalf);
      const __m256i code = _mm256_loadu_si256(codes);
      const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(code, 8), 8);
      const __m256i odd = _mm256_srai_epi16(code, 8);
      unroll<Rows>(OCTAVO_EACH(r) { sum[r] = weigh(sum[r], even, odd, p + r * kTile + key); });
    }
    unroll<Rows>(OCTAVO_EACH(r) {
      I& whole = sums[r * Chunks + kChunk];
      (kHalf == 0 ? whole.lo : whole.hi) = sum[r];
    });
  });
}

#else

using WeightCode = uint8_t;

OCTAVO_INLINE void put_weights(WeightCode* p, I codes) { store_bytes(reinterpret_cast<int8_t*>(p), codes); }

template <std::size_t Rows>
OCTAVO_INLINE void dot_keys(const uint8_t* k, std::size_t stride, std::size_t quads, const int8_t* q, const int32_t*,
                            I* sums) {
  for (std::size_t r = 0; r < Rows; ++r) {
    sums[r] = set1i(0);
    for (std::size_t j = 0; j < quads; ++j) {
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < 4; ++i) sums[r].v[lane] += (k[j * stride + 4 * lane + i] - 128) * q[r * kGroup + 4 * j + i];
      }
    }
  }
}

template <std::size_t Rows, std::size_t Chunks>
OCTAVO_INLINE void weigh_quad(const uint8_t* v, const WeightCode* p, I* sums) {
  for (std::size_t i = 0; i < Rows * Chunks; ++i) {
    const auto* codes = reinterpret_cast<const int8_t*>(v) + 64 * (i % Chunks);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int j = 0; j < 4; ++j) sums[i].v[lane] += codes[4 * lane + j] * p[i / Chunks * kTile + j];
    }
  }
}

#endif

#if defined(__AVX512F__) || !defined(__AVX2__)

template <std::size_t Rows, std::size_t Chunks>
OCTAVO_INLINE void dot_values(const CodeTile& tile, const CodeTile* next, std::size_t keys, std::size_t d,
                              const WeightCode* p, I* sums) {
  unroll<Rows * Chunks>(OCTAVO_EACH(i) { sums[i] = set1i(0); });
  for (std::size_t key = 0; key < keys; key += kKeysOfQuad) {
    const std::size_t at = tile.v_at(key, d);
    if (next != nullptr) {
      unroll<Chunks>(OCTAVO_EACH(c) { __builtin_prefetch(next->v[key / kLanes] + at + 64 * c, 0, 2); });
    }
    weigh_quad<Rows, Chunks>(tile.v[key / kLanes] + at, p + key, sums);
  }
}

#endif

// Calls body with 1 to kRowTile as a constant.
template <class Body>
OCTAVO_INLINE void with_rows(std::size_t rows, const Body& body) {
  switch (rows) {
    case 1:
      return body(std::integral_constant<std::size_t, 1>{});
    case 2:
      return body(std::integral_constant<std::size_t, 2>{});
    case 3:
      return body(std::integral_constant<std::size_t, 3>{});
    case 4:
      return body(std::integral_constant<std::size_t, 4>{});
    case 5:
      return body(std::integral_constant<std::size_t, 5>{});
    case 6:
      return body(std::integral_constant<std::size_t, 6>{});
    case 7:
      return body(std::integral_constant<std::size_t, 7>{});
    default:
      return body(std::integral_constant<std::size_t, 8>{});
  }
}

// Scores of a tile of queries, the first of which is number `first`, over 16 keys. Those a tile further on are asked
// for, if `next` tells where they are.
template <std::size_t Rows>
__attribute__((noinline)) void scores_of(const Quantized& q, std::size_t first, std::size_t dim, const CodeTile& tile,
                                         const CodeTile* next, std::size_t chunk, float* out) {
  const std::size_t groups = q.inputs / kGroup;
  const int8_t* codes = q.codes + first * q.inputs;
  const float* scales = q.scales + first * groups;
  const int32_t* minus_sums = q.minus_sums + first * groups;
  F acc[Rows];
  unroll<Rows>(OCTAVO_EACH(r) { acc[r] = zero(); });
  if (next != nullptr) __builtin_prefetch(next->v_scales[chunk], 0, 2);
  for (std::size_t g = 0; g < groups; ++g) {
    const std::size_t quads = std::min(kQuads, (dim - g * kGroup) / 4);
    if (next != nullptr) {
      for (std::size_t j = 0; j < quads; ++j) {
        __builtin_prefetch(next->k[chunk] + (g * kQuads + j) * next->k_stride, 0, 2);
      }
      __builtin_prefetch(next->k_scales[chunk] + g * next->k_scale_stride, 0, 2);
    }
    I sums[Rows];
    dot_keys<Rows>(tile.k[chunk] + g * kQuads * tile.k_stride, tile.k_stride, quads, codes + g * Rows * kGroup,
                   minus_sums + g * Rows, sums);
    const F of_keys = load(tile.k_scales[chunk] + g * tile.k_scale_stride);
    unroll<Rows>(OCTAVO_EACH(r) { acc[r] = fma(to_float(sums[r]), mul(of_keys, set1(scales[g * Rows + r])), acc[r]); });
  }
  unroll<Rows>(OCTAVO_EACH(r) { store(out + r * kTile + chunk * kLanes, acc[r]); });
}

// A query that sees keys [first, last) of a tile, and what becomes of the sums of its weights' codes times V's.
struct Seeing {
  std::size_t query, first, last;
  float factor;    // by which the sums are multiplied; NaN if a scale is damaged (a weight shows it by the tile's sum)
  float* out;      // [D]: the tile's, or the query's, into which the tile is folded
  bool folds;      // whether something is there already
  float old, now;  // if so, weights of that and of the tile
};

// Dimensions [d, d + 16 Chunks) of what a tile of rows gets from a tile's values.
template <std::size_t Rows, std::size_t Chunks>
__attribute__((noinline)) void values_of(const CodeTile& tile, const CodeTile* next, std::size_t keys, std::size_t d,
                                         const WeightCode* weights, const Seeing* rows) {
  I sums[Rows * Chunks];
  dot_values<Rows, Chunks>(tile, next, keys, d, weights, sums);
  unroll<Rows>(OCTAVO_EACH(r) {
    const F factor = set1(rows[r].factor);
    float* out = rows[r].out + d;
    if (rows[r].folds) {
      const F old = set1(rows[r].old);
      const F now = set1(rows[r].now);
      unroll<Chunks>(OCTAVO_EACH(c) {
        const F of_tile = mul(to_float(sums[r * Chunks + c]), factor);
        store(out + c * kLanes, fma(of_tile, now, mul(load(out + c * kLanes), old)));
      });
    } else {
      unroll<Chunks>(OCTAVO_EACH(c) { store(out + c * kLanes, mul(to_float(sums[r * Chunks + c]), factor)); });
    }
  });
}

// Scales of the values of keys [first, last); those of others are 0.
OCTAVO_INLINE void scales_of(const CodeTile& tile, std::size_t first, std::size_t last, F* scales) {
  for (std::size_t c = 0; c < kChunks; ++c) {
    scales[c] = zero();
    if (c * kLanes >= last || (c + 1) * kLanes <= first) continue;
    scales[c] = abs(load(tile.v_scales[c]));  // NaN has a sign
    if (first == 0 && last == kTile) continue;
    const F number = add(load(kLaneNumbers), set1(static_cast<float>(c * kLanes)));
    scales[c] = select_less(number, set1(static_cast<float>(first)), zero(), scales[c]);
    scales[c] = select_less(number, set1(static_cast<float>(last)), scales[c], zero());
  }
}

// From scores [64] of some queries to codes of their weights, times the scales of the values, and factors. Four queries
// at a time: a reduction across the lanes of one vector is a long chain of instructions that wait for each other.
void weights_of(const CodeTile& tile, float scale, const Query* queries, Seeing* seeing, std::size_t count,
                const float* scores, WeightCode* codes) {
  F scales[kChunks];
  for (std::size_t i = 0; i < count; i += kFour) {
    const std::size_t here = std::min<std::size_t>(kFour, count - i);
    F weights[kFour][kChunks];
    F tops[kFour], sums[kFour];
    for (std::size_t j = 0; j < kFour; ++j) {
      tops[j] = sums[j] = zero();
      if (j >= here) continue;
      const Seeing& one = seeing[i + j];
      tops[j] = scale_scores(scores + one.query * kTile, one.first, one.last, scale, weights[j]);
    }
    float highest[kFour], sum[kFour];
    highest_of_four(tops, highest);
    I products[kFour];
    for (std::size_t j = 0; j < kFour; ++j) {
      products[j] = set1i(0);
      if (j >= here) continue;
      const std::size_t number = i + j;
      const Seeing& one = seeing[number];
      if (number == 0 || one.first != (&one)[-1].first || one.last != (&one)[-1].last) {
        scales_of(tile, one.first, one.last, scales);
      }
      sums[j] = soften(weights[j], highest[j], [](F x) { return exp_of_weight(x); });
      for (std::size_t c = 0; c < kChunks; ++c) {
        weights[j][c] = mul(weights[j][c], scales[c]);
        // None is negative: compared as integers in the order of floats, with the scales' NaN above all.
        products[j] = maxi(products[j], as_int(weights[j][c]));
      }
    }
    int32_t bits[kFour];
    highest_of_four(products, bits);
    sum_of_four(sums, sum);
    for (std::size_t j = 0; j < here; ++j) {
      Seeing& one = seeing[i + j];
      queries[one.query].tile[0] = highest[j];
      queries[one.query].tile[1] = sum[j];
      const float top = float_of_bits(bits[j]);
      one.factor = top < INFINITY ? top / kWeightTop : NAN;
      const float steps = kWeightTop / top;
      const F by = set1(steps < INFINITY && top < INFINITY ? steps : 0.0f);
      for (std::size_t c = 0; c < kChunks; ++c) {
        put_weights(codes + (i + j) * kTile + c * kLanes, to_int(mul(weights[j][c], by)));
      }
    }
  }
}

// Where what queries get from a tile goes: into states of tiles, or folded into what each has so far, whose maximum and
// sum take the tile in here.
void fold_into(Query* queries, Seeing* seeing, std::size_t count, bool split) {
  float* states[kFolds];
  const float* tiles[kFolds];
  Seeing* folded[kFolds];
  std::size_t waiting = 0;
  const auto fold = [&] {
    alignas(64) float weights[kLanes];
    fold_sums(states, tiles, waiting, weights);
    for (std::size_t j = 0; j < waiting; ++j) {
      folded[j]->old = weights[2 * j];
      folded[j]->now = weights[2 * j + 1];
    }
    waiting = 0;
  };
  for (std::size_t i = 0; i < count; ++i) {
    Query& query = queries[seeing[i].query];
    seeing[i].out = (split ? query.tile : query.state) + 2;
    seeing[i].folds = !split && query.begun;
    if (split) continue;
    if (!query.begun) {
      std::memcpy(query.state, query.tile, 2 * sizeof(float));
      query.begun = true;
      continue;
    }
    states[waiting] = query.state;
    tiles[waiting] = query.tile;
    folded[waiting++] = &seeing[i];
    if (waiting == kFolds) fold();
  }
  if (waiting > 0) fold();
}

// Scratch for a block of queries.
struct CodeScratch {
  Quantized q;
  float* scores;        // [queries, 64]
  WeightCode* weights;  // [queries, 64]
  uint8_t* gathered;    // a tile of K and V, with scales
};

OCTAVO_INLINE std::size_t whole_groups(std::size_t head_dim) { return (head_dim + kGroup - 1) / kGroup; }

OCTAVO_INLINE std::size_t code_scratch_bytes(std::size_t head_dim, std::size_t queries) {
  const std::size_t groups = whole_groups(head_dim);
  const std::size_t gathered = kTile * (2 * head_dim + (groups + 1) * sizeof(float));
  return queries * (groups * Quantized::bytes_of_group() + kTile * (sizeof(float) + sizeof(WeightCode))) + gathered;
}

// `bytes` holds as many as code_scratch_bytes, on a line of its own.
OCTAVO_INLINE CodeScratch code_scratch(uint8_t* bytes, std::size_t head_dim, std::size_t queries) {
  const std::size_t groups = whole_groups(head_dim);
  CodeScratch made;
  made.scores = reinterpret_cast<float*>(bytes);
  bytes += queries * kTile * sizeof(float);
  made.weights = reinterpret_cast<WeightCode*>(bytes);
  bytes += queries * kTile * sizeof(WeightCode);
  auto* codes = reinterpret_cast<int8_t*>(bytes);
  auto* scales = reinterpret_cast<float*>(codes + queries * groups * kGroup);
  auto* minus_sums = reinterpret_cast<int32_t*>(scales + queries * groups);
  made.q = {queries, groups * kGroup, codes, scales, nullptr, minus_sums, nullptr};
  made.gathered = reinterpret_cast<uint8_t*>(minus_sums + queries * groups);
  return made;
}

// Codes of a query of `dim` values, a multiple of 16.
OCTAVO_INLINE void quantize_query(const float* q, std::size_t dim, std::size_t number, const Quantized& to) {
  const std::size_t whole = dim / kGroup;
  quantize(q, number, 0, whole, to);
  if (dim % kGroup == 0) return;
  float rest[kGroup] = {};
  std::memcpy(rest, q + whole * kGroup, dim % kGroup * sizeof(float));
  quantize(rest, number, whole, whole + 1, to);
}

// One tile for a block of queries: scores, weights and out of each query that sees some of it, into the states of tiles
// (`split`) or folded into the queries' own.
void one_tile_of_codes(const AttentionPiece& piece, const CodeTile& codes, const CodeTile* next, const Tile& tile,
                       Query* queries, std::size_t count, const CodeScratch& scratch, bool split) {
  const std::size_t dim = piece.kv.head_dim;
  for (std::size_t i = 0; i < count; i += kRowTile) {
    with_rows(std::min(kRowTile, count - i), [&](auto rows) {
      for (std::size_t chunk = 0; chunk < tile.lanes / kLanes; ++chunk) {
        scores_of<decltype(rows)::value>(scratch.q, i, dim, codes, i == 0 ? next : nullptr, chunk,
                                         scratch.scores + i * kTile);
      }
    });
  }
  Seeing see[kRowBlock * 64];
  std::size_t seeing = 0;
  for (std::size_t i = 0; i < count; ++i) {
    Seeing& one = see[seeing];
    one.query = i;
    seen(queries[i], tile, one.first, one.last);
    if (one.first >= one.last) continue;
    float* scores = scratch.scores + i * kTile;
    std::fill(scores + tile.lanes, scores + kTile, 0.0f);
    ++seeing;
  }
  weights_of(codes, piece.scale, queries, see, seeing, scratch.scores, scratch.weights);
  fold_into(queries, see, seeing, split);
  for (std::size_t i = 0; i < seeing; i += kRowTile) {
    const CodeTile* ahead = i == 0 ? next : nullptr;
    const WeightCode* weights = scratch.weights + i * kTile;
    with_rows(std::min(kRowTile, seeing - i), [&](auto rows) {
      constexpr std::size_t kRows = decltype(rows)::value;
      std::size_t d = 0;
      for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
        values_of<kRows, 2>(codes, ahead, tile.keys, d, weights, see + i);
      }
      if (d < dim) values_of<kRows, 1>(codes, ahead, tile.keys, d, weights, see + i);
    });
  }
}

}  // namespace octavo::OCTAVO_ISA
