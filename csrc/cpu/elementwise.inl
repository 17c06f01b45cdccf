// Ops on rows: norms, gates, rotations, embedding, storing K and V.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "math.inl"

namespace octavo::OCTAVO_ISA {

// Loads and stores of what is left of a row at its end, with zeros in the other lanes.
OCTAVO_INLINE F load_some(const float* p, std::size_t count) {
  if (count >= static_cast<std::size_t>(kLanes)) return load(p);
  float v[kLanes] = {};
  std::memcpy(v, p, count * sizeof(float));
  return load(v);
}
OCTAVO_INLINE void store_some(float* p, F a, std::size_t count) {
  if (count >= static_cast<std::size_t>(kLanes)) return store(p, a);
  float v[kLanes];
  store(v, a);
  std::memcpy(p, v, count * sizeof(float));
}

// The sum of squares is made of 16 partial sums (element i goes to sum i mod 16) folded by a fixed tree.
void rms_norm(const float* x, const float* weight, const float* residual, std::size_t n, float eps, float* y) {
  F squares = zero();
  for (std::size_t i = 0; i < n; i += kLanes) {
    const F a = load_some(x + i, n - i);
    squares = fma(a, a, squares);
  }
  const float mean = sum_of(squares) / static_cast<float>(n);
  const F scale = set1(1.0f / std::sqrt(mean + eps));
  for (std::size_t i = 0; i < n; i += kLanes) {
    F a = mul(mul(load_some(x + i, n - i), scale), load_some(weight + i, n - i));
    if (residual != nullptr) a = add(a, load_some(residual + i, n - i));
    store_some(y + i, a, n - i);
  }
}

void gated(const float* x, const float* up, std::size_t n, Gate gate, float* y) {
  for (std::size_t i = 0; i < n; i += kLanes) {
    const F a = load_some(x + i, n - i);
    store_some(y + i, mul(gate == Gate::Silu ? silu(a) : gelu_tanh(a), load_some(up + i, n - i)), n - i);
  }
}

void rope(const float* x, const float* cosines, const float* sines, std::size_t dim, std::size_t head_dim, float* y) {
  const std::size_t half = dim / 2;
  for (std::size_t i = 0; i < half; i += kLanes) {
    const std::size_t left = half - i;
    const F first = load_some(x + i, left);
    const F second = load_some(x + half + i, left);
    const F c = load_some(cosines + i, left);
    const F s = load_some(sines + i, left);
    store_some(y + i, sub(mul(first, c), mul(second, s)), left);
    store_some(y + half + i, add(mul(second, c), mul(first, s)), left);
  }
  if (y != x) std::memcpy(y + dim, x + dim, (head_dim - dim) * sizeof(float));
}

void embed(Format format, const uint8_t* packed, std::size_t inputs, std::size_t column, float scale, float* out) {
  unpack_row(format, packed, inputs, column, out);
  if (scale == 1.0f) return;
  for (std::size_t i = 0; i < inputs; i += kLanes) {
    store_some(out + i, mul(load_some(out + i, inputs - i), set1(scale)), inputs - i);
  }
}

// --- K and V as stored ---

// Int8 codes of `count` values of a token, a multiple of 16, that share a scale. Symmetric, by the greatest; a scale
// that is NaN or infinite if they have any such, so that damage shows. The scale is stored at `at`.
OCTAVO_INLINE void kv_codes(const float* values, std::size_t count, uint8_t* at, int8_t* codes) {
  // Of floats without their sign the order of integers is the same, with NaN on top.
  I sizes[kFour] = {set1i(0), set1i(0), set1i(0), set1i(0)};
  for (std::size_t i = 0; i < count; i += kLanes) {
    I& size = sizes[i / kLanes % kFour];
    size = maxi(size, as_int(abs(load(values + i))));
  }
  int32_t tops[kFour];
  highest_of_four(sizes, tops);
  const float top = float_of_bits(std::max({tops[0], tops[1], tops[2], tops[3]}));
  const float scale = top / 127.0f;
  std::memcpy(at, &scale, sizeof scale);
  const float steps = steps_per_unit(top);
  if (steps == 0.0f) {
    std::memset(codes, 0, count);
    return;
  }
  for (std::size_t i = 0; i < count; i += kLanes) store_bytes(codes + i, to_int(mul(load(values + i), set1(steps))));
}

void store_kv(const KVView& kv, const float* k, const float* v, std::size_t kv_head, long slot) {
  const std::size_t block = static_cast<std::size_t>(slot) / kv.block_size;
  const std::size_t offset = static_cast<std::size_t>(slot) % kv.block_size;
  uint8_t* const k_head = kv.k + (block * kv.kv_heads + kv_head) * kv.k_head_bytes();
  uint8_t* const v_head = kv.v + (block * kv.kv_heads + kv_head) * kv.v_head_bytes();
  if (kv.type == KVType::F16) {
    auto* keys = reinterpret_cast<uint16_t*>(k_head) + offset;
    auto* values = reinterpret_cast<uint16_t*>(v_head) + offset * kv.head_dim;
    for (std::size_t d = 0; d < kv.head_dim; d += kLanes) {
      uint16_t halves[kLanes];
      store_half(halves, load(k + d));
      for (std::size_t i = 0; i < static_cast<std::size_t>(kLanes); ++i) keys[(d + i) * kv.block_size] = halves[i];
      store_half(values + d, load(v + d));
    }
    return;
  }
  if (kv.type == KVType::F32) {
    auto* keys = reinterpret_cast<float*>(k_head) + offset;
    for (std::size_t d = 0; d < kv.head_dim; ++d) keys[d * kv.block_size] = k[d];
    std::memcpy(reinterpret_cast<float*>(v_head) + offset * kv.head_dim, v, kv.head_dim * sizeof(float));
    return;
  }
  int8_t codes[kMostHeadDim];
  for (std::size_t first = 0; first < kv.head_dim; first += KVView::kScaled) {
    const std::size_t count = std::min(KVView::kScaled, kv.head_dim - first);
    kv_codes(k + first, count, k_head + kv.k_scale_at(first, offset), codes);
    for (std::size_t d = 0; d < count; d += 4) {
      uint32_t four;
      std::memcpy(&four, codes + d, 4);
      four ^= 0x80808080u;
      std::memcpy(k_head + kv.k_code_at(first + d, offset), &four, 4);
    }
  }
  kv_codes(v, kv.head_dim, v_head + kv.v_scale_at(offset), codes);
  for (std::size_t d = 0; d < kv.head_dim; ++d) v_head[kv.v_code_at(d, offset)] = static_cast<uint8_t>(codes[d]);
}

}  // namespace octavo::OCTAVO_ISA
