// y = x @ W^T for packed weights. One row and many rows are instances of one template, so a row's result does not
// depend on how many others there are: per output, acc = fma(isum, w_scale * x_scale, acc) over groups ascending, then
// the minimum over groups ascending, then the bias, then the residual.
#pragma once

#include <bit>
#include <type_traits>

#include "kernels.h"
#include "math.inl"
#include "simd.h"

namespace octavo::OCTAVO_ISA {

// --- codes ---

// Quad j (0 .. 7) of a group: for each of 16 outputs, the codes of inputs 4j .. 4j + 3.
template <Codes kind>
OCTAVO_INLINE Q code_quad(const uint8_t* p, std::size_t j) {
  if constexpr (kind == Codes::kTwo) {
    return shift_mask(load_codes(p + 64 * (j / 4)), static_cast<int>(j % 4 * 2), 3);
  } else if constexpr (kind == Codes::kBytes) {
    return load_codes(p + 64 * j);
  } else {
    const Q low = shift_mask(load_codes(p + 64 * (j % 4)), static_cast<int>(j / 4 * 4), 15);
    if constexpr (kind == Codes::kNibbles) return low;
    const Q high = load_codes(p + 256);
    const int place = static_cast<int>(j);
    return orq(low, place < 4 ? shift_left_mask(high, 4 - place, 16) : shift_mask(high, place - 4, 16));
  }
}

// --- integer sums: exact, whatever the way ---
//
// dot_quads: sums[r] lane c += sum over quads [First, Last) of codes * x, codes of at most MaxCode, x [Rows, 32].
// Quads are the outer loop, so that the rows' sums are independent chains and one quad of codes is alive at a time.

OCTAVO_INLINE int32_t four_of(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return four;
}

#if defined(__AVX512F__)

template <int MaxCode>
constexpr bool kWithoutZero = false;

// sum + code * the four inputs at x. In assembly, since GCC makes of the broadcast an instruction of its own.
OCTAVO_INLINE __m512i multiply_add(__m512i sum, __m512i code, const int8_t* x) {
  asm("vpdpbusd %[x]%{1to16%}, %[c], %[s]"
      : [s] "+v"(sum)
      : [c] "v"(code), [x] "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
  return sum;
}

template <Codes kind, int MaxCode, std::size_t First, std::size_t Last, std::size_t Rows>
OCTAVO_INLINE void dot_quads(const uint8_t* codes, const int8_t* x, I* sums) {
  __m512i sum[Rows];
  unroll<Rows>(OCTAVO_EACH(r) { sum[r] = sums[r].v; });
  unroll<Last - First>(OCTAVO_EACH(step) {
    constexpr std::size_t j = First + step;
    const Q code = code_quad<kind>(codes, j);
    unroll<Rows>(OCTAVO_EACH(r) { sum[r] = multiply_add(sum[r], code.v, x + r * kGroup + 4 * j); });
  });
  unroll<Rows>(OCTAVO_EACH(r) { sums[r].v = sum[r]; });
}

#elif defined(__AVXVNNI__)

template <int MaxCode>
constexpr bool kWithoutZero = false;

// Sums of a row, for 8 outputs each.
struct Halves {
  __m256i lo, hi;
};

// sums + codes * the four inputs at x. In assembly, since GCC keeps broadcasts for later use and spills them.
OCTAVO_INLINE void multiply_add(Halves& sums, Q code, const int8_t* x) {
  __m256i four;
  asm("vpbroadcastd %[x], %[f]\n\t"
      "%{vex%} vpdpbusd %[f], %[cl], %[l]\n\t"
      "%{vex%} vpdpbusd %[f], %[ch], %[h]"
      : [l] "+&x"(sums.lo), [h] "+&x"(sums.hi), [f] "=&x"(four)
      : [cl] "x"(code.lo), [ch] "x"(code.hi), [x] "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
}

// Of `Rows` rows, at most four: their sums, a quad of codes and what it is made of fit the 16 registers.
template <Codes kind, std::size_t First, std::size_t Last, std::size_t Rows>
OCTAVO_INLINE void dot_some(const uint8_t* codes, const int8_t* x, I* sums) {
  Halves sum[Rows];
  unroll<Rows>(OCTAVO_EACH(r) { sum[r] = {sums[r].lo, sums[r].hi}; });
  unroll<Last - First>(OCTAVO_EACH(step) {
    constexpr std::size_t j = First + step;
    const Q code = code_quad<kind>(codes, j);
    unroll<Rows>(OCTAVO_EACH(r) { multiply_add(sum[r], code, x + r * kGroup + 4 * j); });
  });
  unroll<Rows>(OCTAVO_EACH(r) { sums[r] = {sum[r].lo, sum[r].hi}; });
}

template <Codes kind, int MaxCode, std::size_t First, std::size_t Last, std::size_t Rows>
OCTAVO_INLINE void dot_quads(const uint8_t* codes, const int8_t* x, I* sums) {
  constexpr std::size_t kFours = Rows / 4;
  unroll<kFours>(OCTAVO_EACH(i) { dot_some<kind, First, Last, 4>(codes, x + 4 * i * kGroup, sums + 4 * i); });
  if constexpr (Rows % 4 != 0) {
    dot_some<kind, First, Last, Rows % 4>(codes, x + 4 * kFours * kGroup, sums + 4 * kFours);
  }
}

#elif defined(__AVX2__)

// 128 is taken off each code of 8 bits first, so that no sum of inputs is needed to correct the product.
template <int MaxCode>
constexpr bool kWithoutZero = MaxCode > 127;

// Words and sums of a row, for 8 outputs each.
struct Halves {
  __m256i lo, hi;
};

// words += sums of two products each of the codes and four broadcast inputs. In assembly, since GCC keeps broadcasts
// for later use and spills them, which costs more than the multiplication.
OCTAVO_INLINE void multiply_add(Halves& words, Q code, const int8_t* x) {
  __m256i four, product;
  asm("vpbroadcastd %[x], %[f]\n\t"
      "vpmaddubsw %[f], %[cl], %[p]\n\t"
      "vpmaddubsw %[f], %[ch], %[f]\n\t"
      "vpaddw %[p], %[l], %[l]\n\t"
      "vpaddw %[f], %[h], %[h]"
      : [l] "+x"(words.lo), [h] "+x"(words.hi), [f] "=&x"(four), [p] "=&x"(product)
      : [cl] "x"(code.lo), [ch] "x"(code.hi), [x] "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
}

// sums += products of a signed code, of at most 128 in size, and four broadcast inputs: |code| times the
// inputs with the sign of the code, by twos in int16, which holds 2 * 128 * 127.
OCTAVO_INLINE __m256i multiply_add_signed(__m256i sum, __m256i code, __m256i size, __m256i ones, const int8_t* x) {
  __m256i product;
  asm("vpbroadcastd %[x], %[p]\n\t"
      "vpsignb %[c], %[p], %[p]\n\t"
      "vpmaddubsw %[p], %[z], %[p]\n\t"
      "vpmaddwd %[o], %[p], %[p]\n\t"
      "vpaddd %[p], %[s], %[s]"
      : [s] "+x"(sum), [p] "=&x"(product)
      : [c] "x"(code), [z] "x"(size), [o] "x"(ones), [x] "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
  return sum;
}

// Of `Rows` rows, at most four: their words or sums, the codes and what is made of them fit the 16 registers.
template <Codes kind, int MaxCode, std::size_t First, std::size_t Last, std::size_t Rows>
OCTAVO_INLINE void dot_some(const uint8_t* codes, const int8_t* x, I* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  // vpmaddubsw adds two products into int16, which holds kSteps quads of them before it must be widened.
  constexpr std::size_t kSteps = 32767 / (2 * 127 * MaxCode);
  static_assert(kSteps >= 1);
  constexpr std::size_t kRounds = (Last - First + kSteps - 1) / kSteps;
  unroll<kRounds>(OCTAVO_EACH(round) {
    constexpr std::size_t kBegin = First + round * kSteps;
    constexpr std::size_t kCount = kBegin + kSteps < Last ? kSteps : Last - kBegin;
    Halves words[Rows];
    unroll<Rows>(OCTAVO_EACH(r) { words[r].lo = words[r].hi = _mm256_setzero_si256(); });
    unroll<kCount>(OCTAVO_EACH(step) {
      constexpr std::size_t j = kBegin + step;
      const Q code = code_quad<kind>(codes, j);
      unroll<Rows>(OCTAVO_EACH(r) { multiply_add(words[r], code, x + r * kGroup + 4 * j); });
    });
    unroll<Rows>(OCTAVO_EACH(r) {
      sums[r].lo = _mm256_add_epi32(sums[r].lo, _mm256_madd_epi16(words[r].lo, ones));
      sums[r].hi = _mm256_add_epi32(sums[r].hi, _mm256_madd_epi16(words[r].hi, ones));
    });
  });
}

// One half (8 outputs) of each quad of bytes, which lie `stride` apart and are 128 more than their codes.
template <std::size_t Rows, int Half>
OCTAVO_INLINE void dot_half_signed(const uint8_t* codes, std::size_t stride, std::size_t quads, const int8_t* x,
                                   __m256i* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (std::size_t j = 0; j < quads; ++j) {
    const auto* at = reinterpret_cast<const __m256i*>(codes + j * stride + 32 * Half);
    const __m256i code = _mm256_xor_si256(_mm256_loadu_si256(at), _mm256_set1_epi8(-128));
    const __m256i size = _mm256_abs_epi8(code);
    unroll<Rows>(OCTAVO_EACH(r) { sums[r] = multiply_add_signed(sums[r], code, size, ones, x + r * kGroup + 4 * j); });
  }
}

template <std::size_t Rows>
OCTAVO_INLINE void dot_signed(const uint8_t* codes, std::size_t stride, std::size_t quads, const int8_t* x, I* sums) {
  __m256i half[Rows];
  unroll<Rows>(OCTAVO_EACH(r) { half[r] = sums[r].lo; });
  dot_half_signed<Rows, 0>(codes, stride, quads, x, half);
  unroll<Rows>(OCTAVO_EACH(r) { sums[r].lo = half[r]; });
  unroll<Rows>(OCTAVO_EACH(r) { half[r] = sums[r].hi; });
  dot_half_signed<Rows, 1>(codes, stride, quads, x, half);
  unroll<Rows>(OCTAVO_EACH(r) { sums[r].hi = half[r]; });
}

template <Codes kind, int MaxCode, std::size_t First, std::size_t Last, std::size_t Rows>
OCTAVO_INLINE void dot_quads(const uint8_t* codes, const int8_t* x, I* sums) {
  if constexpr (kWithoutZero<MaxCode>) {
    static_assert(kind == Codes::kBytes && First == 0);
    dot_signed<Rows>(codes, 64, Last, x, sums);
  } else {
    constexpr std::size_t kFours = Rows / 4;
    unroll<kFours>(
        OCTAVO_EACH(i) { dot_some<kind, MaxCode, First, Last, 4>(codes, x + 4 * i * kGroup, sums + 4 * i); });
    if constexpr (Rows % 4 != 0) {
      dot_some<kind, MaxCode, First, Last, Rows % 4>(codes, x + 4 * kFours * kGroup, sums + 4 * kFours);
    }
  }
}

#else

template <int MaxCode>
constexpr bool kWithoutZero = false;

template <Codes kind, int MaxCode, std::size_t First, std::size_t Last, std::size_t Rows>
OCTAVO_INLINE void dot_quads(const uint8_t* codes, const int8_t* x, I* sums) {
  int32_t sum[Rows][kLanes];
  for (std::size_t r = 0; r < Rows; ++r) std::memcpy(sum[r], sums[r].v, sizeof sum[r]);
  for (std::size_t j = First; j < Last; ++j) {
    const Q code = code_quad<kind>(codes, j);
    for (std::size_t r = 0; r < Rows; ++r) {
      const int8_t* four = x + r * kGroup + 4 * j;
      for (int c = 0; c < kLanes; ++c) {
        const uint8_t* codes_of = code.v + 4 * c;
        sum[r][c] += codes_of[0] * four[0] + codes_of[1] * four[1] + codes_of[2] * four[2] + codes_of[3] * four[3];
      }
    }
  }
  for (std::size_t r = 0; r < Rows; ++r) std::memcpy(sums[r].v, sum[r], sizeof sum[r]);
}

#endif

// --- scales ---

OCTAVO_INLINE F load_half_bytes(const uint8_t* p) { return load_half(reinterpret_cast<const uint16_t*>(p)); }
OCTAVO_INLINE F load_low_nibbles(const uint8_t* p) {
  uint8_t low[kLanes];
  for (int i = 0; i < kLanes; ++i) low[i] = p[i] & 15;
  return load_u8(low);
}
OCTAVO_INLINE F load_high_nibbles(const uint8_t* p) {
  uint8_t high[kLanes];
  for (int i = 0; i < kLanes; ++i) high[i] = p[i] >> 4;
  return load_u8(high);
}

template <Format format>
OCTAVO_INLINE F scale_of(const uint8_t* super, const uint8_t* group, int subgroup) {
  if constexpr (format == Format::Q2_K) {
    return mul(load_half_bytes(super), load_low_nibbles(group + 16 * subgroup));
  } else if constexpr (format == Format::Q3_K || format == Format::Q6_K) {
    return mul(load_half_bytes(super), load_i8(reinterpret_cast<const int8_t*>(group) + 16 * subgroup));
  } else if constexpr (format == Format::Q4_K || format == Format::Q5_K) {
    return mul(load_half_bytes(super), load_u8(group));
  } else {
    return load_half_bytes(group);
  }
}

// To be added.
template <Format format>
OCTAVO_INLINE F minimum_of(const uint8_t* super, const uint8_t* group, int subgroup) {
  if constexpr (format == Format::Q2_K) {
    return sub(zero(), mul(load_half_bytes(super + 32), load_high_nibbles(group + 16 * subgroup)));
  } else if constexpr (format == Format::Q4_K || format == Format::Q5_K) {
    return sub(zero(), mul(load_half_bytes(super + 32), load_u8(group + 16)));
  } else {
    return load_half_bytes(group + 32);
  }
}

// Visits a panel's groups in order: visit(super, group, index).
template <Format format, class Visit>
OCTAVO_INLINE void each_group(const uint8_t* panel, std::size_t groups, const Visit& visit) {
  constexpr Layout layout = layout_of(format);
  const uint8_t* p = panel;
  if constexpr (layout.groups_per_super == 1) {
    for (std::size_t g = 0; g < groups; ++g, p += layout.group_bytes) visit(p, p, g);
  } else {
    for (std::size_t g = 0; g < groups;) {
      const uint8_t* super = p;
      p += layout.super_bytes;
      for (int i = 0; i < layout.groups_per_super; ++i, ++g, p += layout.group_bytes) visit(super, p, g);
    }
  }
}

// --- one panel, Rows rows ---

constexpr std::size_t kAhead = 4096;  // with one tile: what memory delivers to a thread in some 200 nanoseconds

// Adds bias and residual and stores what of the panel belongs to the matrix.
OCTAVO_INLINE void finish_row(const LinearPiece& piece, std::size_t row, std::size_t panel, F acc) {
  if (piece.bias != nullptr) acc = add(acc, load(piece.bias + panel * kPanel));
  const std::size_t at = row * piece.stride + panel * kPanel;
  const std::size_t left = piece.outputs - panel * kPanel;
  if (left >= kPanel) {
    if (piece.residual != nullptr) acc = add(acc, load(piece.residual + at));
    store(piece.y + at, acc);
    return;
  }
  float values[kPanel] = {};
  if (piece.residual != nullptr) {
    std::memcpy(values, piece.residual + at, left * sizeof(float));
    acc = add(acc, load(values));
  }
  store(values, acc);
  std::memcpy(piece.y + at, values, left * sizeof(float));
}

// Weights are asked for ahead of their use: those of every `every`-th group from `next` on, `ahead` bytes further on.
// Tiles of rows that go over the same panel share the next one among them, so that memory is read at an even pace.
template <Format format, std::size_t Rows>
OCTAVO_INLINE void panel_of_codes(const LinearPiece& piece, std::size_t panel, std::size_t row, std::size_t ahead,
                                  std::size_t next, std::size_t every) {
  constexpr Layout layout = layout_of(format);
  constexpr std::size_t kScaleBytes = layout.group_bytes - layout.code_bytes;
  constexpr std::size_t kPart = kQuads / layout.subgroups;
  const std::size_t groups = piece.inputs / kGroup;
  const uint8_t* packed = piece.packed + panel * layout.panel_bytes(piece.inputs);
  const int8_t* x = piece.q.codes + row * piece.inputs;  // what is before the tile lies in full tiles
  const float* scales = piece.q.scales + row * groups;
  const float* totals = layout.needs_totals() ? piece.q.totals + row * groups : nullptr;
  const int32_t* minus_sums = layout.needs_sums() ? piece.q.minus_sums + row * groups : nullptr;
  const int32_t* minus_parts = layout.needs_parts() ? piece.q.minus_parts + 2 * row * groups : nullptr;
  F acc[Rows];
  for (std::size_t r = 0; r < Rows; ++r) acc[r] = zero();
  each_group<format>(packed, groups, [&](const uint8_t* super, const uint8_t* group, std::size_t g) {
    if (g == next) {
      for (std::size_t byte = 0; byte < layout.group_bytes; byte += 64) __builtin_prefetch(group + ahead + byte, 0, 2);
      next += every;
    }
    const uint8_t* codes = group + kScaleBytes;
    const auto part = [&](auto subgroup) {
      constexpr std::size_t kSub = decltype(subgroup)::value;
      const F scale = scale_of<format>(super, group, kSub);
      I isum[Rows];
      unroll<Rows>(OCTAVO_EACH(r) {
        if constexpr (layout.zero == 0 || kWithoutZero<layout.max_code>) {
          static_assert(!kWithoutZero<layout.max_code> || layout.zero == 128);
          isum[r] = set1i(0);
        } else {
          static_assert(std::has_single_bit(static_cast<unsigned>(layout.zero)));
          constexpr int kShift = std::countr_zero(static_cast<unsigned>(layout.zero));
          const int32_t minus = layout.needs_sums() ? minus_sums[g * Rows + r] : minus_parts[(2 * g + kSub) * Rows + r];
          isum[r] = shift_left(set1i(minus), kShift);
        }
      });
      dot_quads<layout.codes, layout.max_code, kSub * kPart, (kSub + 1) * kPart, Rows>(codes, x + g * kGroup * Rows,
                                                                                       isum);
      unroll<Rows>(OCTAVO_EACH(r) { acc[r] = fma(to_float(isum[r]), mul(scale, set1(scales[g * Rows + r])), acc[r]); });
    };
    part(std::integral_constant<std::size_t, 0>{});
    if constexpr (layout.subgroups == 2) part(std::integral_constant<std::size_t, 1>{});
  });
  if constexpr (layout.has_minimum) {
    each_group<format>(packed, groups, [&](const uint8_t* super, const uint8_t* group, std::size_t g) {
      for (int s = 0; s < layout.subgroups; ++s) {
        const F minimum = minimum_of<format>(super, group, s);
        unroll<Rows>(OCTAVO_EACH(r) {
          if constexpr (layout.needs_totals()) {
            acc[r] = fma(minimum, set1(totals[g * Rows + r]), acc[r]);
          } else {
            const int32_t minus = minus_parts[(2 * g + static_cast<std::size_t>(s)) * Rows + r];
            acc[r] = fma(minimum, set1(scales[g * Rows + r] * static_cast<float>(-minus)), acc[r]);
          }
        });
      }
    });
  }
  // Unrolled: sums with a variable index would live in memory, and be stored there group by group.
  unroll<Rows>(OCTAVO_EACH(r) { finish_row(piece, row + r, panel, acc[r]); });
}

template <Format format>
OCTAVO_INLINE F load_weights(const uint8_t* p) {
  if constexpr (format == Format::F32) return load(reinterpret_cast<const float*>(p));
  if constexpr (format == Format::F16) return load_half(reinterpret_cast<const uint16_t*>(p));
  return load_bfloat(reinterpret_cast<const uint16_t*>(p));
}

template <Format format, std::size_t Rows>
OCTAVO_INLINE void panel_of_floats(const LinearPiece& piece, std::size_t panel, std::size_t row) {
  constexpr std::size_t kStep = kPanel * float_bytes(format);
  const uint8_t* packed = piece.packed + panel * panel_bytes(format, piece.inputs);
  const float* x = piece.x + row * piece.inputs;
  F acc[Rows];
  for (std::size_t r = 0; r < Rows; ++r) acc[r] = zero();
  for (std::size_t k = 0; k < piece.inputs; ++k, packed += kStep) {
    const F weights = load_weights<format>(packed);
    for (std::size_t r = 0; r < Rows; ++r) acc[r] = fma(set1(x[r * piece.inputs + k]), weights, acc[r]);
  }
  for (std::size_t r = 0; r < Rows; ++r) finish_row(piece, row + r, panel, acc[r]);
}

template <Format format, std::size_t Rows>
__attribute__((noinline)) void panel_rows(const LinearPiece& piece, std::size_t panel, std::size_t row,
                                          std::size_t ahead, std::size_t next, std::size_t every) {
  if constexpr (is_float(format)) {
    panel_of_floats<format, Rows>(piece, panel, row);
  } else {
    panel_of_codes<format, Rows>(piece, panel, row, ahead, next, every);
  }
}

template <Format format>
void linear_of(const LinearPiece& piece) {
  const std::size_t first_row = piece.first_row;
  const std::size_t last_row = piece.last_row;
  const std::size_t tiles = (last_row - first_row + kRowTile - 1) / kRowTile;
  const std::size_t ahead = tiles == 1 ? kAhead : panel_bytes(format, piece.inputs);
  for (std::size_t panel = piece.first_panel; panel < piece.last_panel; ++panel) {
    std::size_t tile = 0;
    for (; first_row + (tile + 1) * kRowTile <= last_row; ++tile) {
      panel_rows<format, kRowTile>(piece, panel, first_row + tile * kRowTile, ahead, tile, tiles);
    }
    const std::size_t row = first_row + tile * kRowTile;
    switch (last_row - row) {
      case 7:
        panel_rows<format, 7>(piece, panel, row, ahead, tile, tiles);
        break;
      case 6:
        panel_rows<format, 6>(piece, panel, row, ahead, tile, tiles);
        break;
      case 5:
        panel_rows<format, 5>(piece, panel, row, ahead, tile, tiles);
        break;
      case 4:
        panel_rows<format, 4>(piece, panel, row, ahead, tile, tiles);
        break;
      case 3:
        panel_rows<format, 3>(piece, panel, row, ahead, tile, tiles);
        break;
      case 2:
        panel_rows<format, 2>(piece, panel, row, ahead, tile, tiles);
        break;
      case 1:
        panel_rows<format, 1>(piece, panel, row, ahead, tile, tiles);
        break;
      default:
        break;
    }
  }
}

void linear(const LinearPiece& piece) {
  switch (piece.format) {
    case Format::F32:
      return linear_of<Format::F32>(piece);
    case Format::F16:
      return linear_of<Format::F16>(piece);
    case Format::BF16:
      return linear_of<Format::BF16>(piece);
    case Format::Q4_0:
      return linear_of<Format::Q4_0>(piece);
    case Format::Q4_1:
      return linear_of<Format::Q4_1>(piece);
    case Format::Q5_0:
      return linear_of<Format::Q5_0>(piece);
    case Format::Q5_1:
      return linear_of<Format::Q5_1>(piece);
    case Format::Q8_0:
      return linear_of<Format::Q8_0>(piece);
    case Format::Q2_K:
      return linear_of<Format::Q2_K>(piece);
    case Format::Q3_K:
      return linear_of<Format::Q3_K>(piece);
    case Format::Q4_K:
      return linear_of<Format::Q4_K>(piece);
    case Format::Q5_K:
      return linear_of<Format::Q5_K>(piece);
    case Format::Q6_K:
      return linear_of<Format::Q6_K>(piece);
  }
}

// --- activations ---

// Symmetric, to nearest: code = round(x * 127 / max|x|). Looks at each group of the row alone. A group with NaN or
// infinity has codes of 0 and a scale that is not finite, so that damage shows in the result, as NaN. A group so small
// that 127 / max|x| is infinite (max|x| below 3.8e-37) is taken for zeros.
void quantize(const float* x, std::size_t row, std::size_t first, std::size_t last, const Quantized& to) {
  const std::size_t tile = row / kRowTile * kRowTile;
  const std::size_t rows = to.tile_rows(tile);
  const std::size_t before = tile * (to.inputs / kGroup);
  int8_t* codes = to.codes + tile * to.inputs + (row - tile) * kGroup;
  const std::size_t at = before + row - tile;
  const std::size_t at_parts = 2 * before + row - tile;
  float* scales = to.scales + at;
  for (std::size_t g = first; g < last; g += kFour) {
    std::size_t group[kFour];  // the last one several times where there are fewer
    for (std::size_t i = 0; i < kFour; ++i) group[i] = g + i < last ? g + i : last - 1;
    F lo[kFour], hi[kFour];
    I tops[kFour];
    for (std::size_t i = 0; i < kFour; ++i) {
      const float* values = x + (group[i] - first) * kGroup;
      lo[i] = load(values);
      hi[i] = load(values + kLanes);
      // Compared as integers: of floats without their sign that is the same order, and NaN comes out on top.
      tops[i] = maxi(as_int(abs(lo[i])), as_int(abs(hi[i])));
    }
    int32_t bits[kFour];
    highest_of_four(tops, bits);
    float scale[kFour], steps[kFour];
    for (std::size_t i = 0; i < kFour; ++i) scale[i] = float_of_bits(bits[i]) / 127.0f;
    for (std::size_t i = 0; i < kFour; ++i) steps[i] = steps_per_unit(float_of_bits(bits[i]));
    I lo_codes[kFour], hi_codes[kFour];
    for (std::size_t i = 0; i < kFour; ++i) {
      lo_codes[i] = hi_codes[i] = set1i(0);
      if (steps[i] != 0.0f) {
        lo_codes[i] = to_int(mul(lo[i], set1(steps[i])));
        hi_codes[i] = to_int(mul(hi[i], set1(steps[i])));
      }
      store_bytes(codes + group[i] * rows * kGroup, lo_codes[i]);
      store_bytes(codes + group[i] * rows * kGroup + kLanes, hi_codes[i]);
    }
    for (std::size_t i = 0; i < kFour; ++i) scales[group[i] * rows] = scale[i];
    if (to.totals != nullptr || to.minus_sums != nullptr) {
      I codes_of[kFour];
      int32_t sums[kFour];
      for (std::size_t i = 0; i < kFour; ++i) codes_of[i] = addi(lo_codes[i], hi_codes[i]);
      sum_of_four(codes_of, sums);
      for (std::size_t i = 0; to.totals != nullptr && i < kFour; ++i) {
        to.totals[at + group[i] * rows] = scale[i] * static_cast<float>(sums[i]);
      }
      for (std::size_t i = 0; to.minus_sums != nullptr && i < kFour; ++i) {
        to.minus_sums[at + group[i] * rows] = -sums[i];
      }
    }
    if (to.minus_parts != nullptr) {
      int32_t firsts[kFour], lasts[kFour];
      sum_of_four(lo_codes, firsts);
      sum_of_four(hi_codes, lasts);
      for (std::size_t i = 0; i < kFour; ++i) {
        to.minus_parts[at_parts + 2 * group[i] * rows] = -firsts[i];
        to.minus_parts[at_parts + (2 * group[i] + 1) * rows] = -lasts[i];
      }
    }
  }
}

}  // namespace octavo::OCTAVO_ISA
