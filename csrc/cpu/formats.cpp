#include "formats.h"

#include <cmath>
#include <cstring>

namespace octavo {

float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t fraction = half & 1023u;
  uint32_t bits;
  if (exponent == 31) {
    // Infinity, or NaN made quiet, as the processors' instruction does.
    bits = sign | 0x7f800000u | (fraction << 13) | (fraction != 0 ? 0x400000u : 0u);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (fraction << 13);
  } else {
    const float value = static_cast<float>(fraction) * 0x1p-24f;  // exact
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

uint16_t half_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // below the least normal half: rounded in steps of 2^-24
    const float scaled = std::fabs(value) * 0x1p24f;
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyintf(scaled)));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + odd - 0x38000000u) >> 13));
}

namespace {

struct Place {
  uint8_t* super;  // what the super-block shares
  uint8_t* group;  // the group's scales; its codes follow
};

Place place_of(const Layout& layout, uint8_t* panel, std::size_t group) {
  const std::size_t per = static_cast<std::size_t>(layout.groups_per_super);
  uint8_t* super = panel + group / per * (layout.super_bytes + per * layout.group_bytes);
  return {super, super + layout.super_bytes + group % per * layout.group_bytes};
}

std::size_t scale_bytes(const Layout& layout) { return layout.group_bytes - layout.code_bytes; }

// The 32 codes of one output in a group, four to a word: byte i of word j is the code of input 4j + i.
using Words = uint32_t[kQuads];

constexpr uint32_t each_byte(uint32_t byte) { return byte * 0x01010101u; }

uint32_t word_at(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

// Codes go to their places, which begin as zeros, a word at a time.
void put_codes(Codes codes, uint8_t* at, std::size_t c, const Words& words) {
  const auto put = [&](std::size_t vector, uint32_t word) { std::memcpy(at + 64 * vector + 4 * c, &word, 4); };
  switch (codes) {
    case Codes::kTwo:
      for (std::size_t v = 0; v < 2; ++v) {
        put(v, words[4 * v] | words[4 * v + 1] << 2 | words[4 * v + 2] << 4 | words[4 * v + 3] << 6);
      }
      return;
    case Codes::kNibblesAndBit: {
      uint32_t high = 0;
      for (std::size_t j = 0; j < kQuads; ++j) high |= ((words[j] >> 4) & each_byte(1)) << j;
      put(4, high);
      [[fallthrough]];
    }
    case Codes::kNibbles:
      for (std::size_t v = 0; v < 4; ++v) put(v, (words[v] & each_byte(15)) | (words[v + 4] & each_byte(15)) << 4);
      return;
    case Codes::kBytes:
      for (std::size_t j = 0; j < kQuads; ++j) put(j, words[j]);
      return;
  }
}

void get_codes(Codes codes, const uint8_t* at, std::size_t c, Words& words) {
  const auto get = [&](std::size_t vector) { return word_at(at + 64 * vector + 4 * c); };
  switch (codes) {
    case Codes::kTwo:
      for (std::size_t j = 0; j < kQuads; ++j) words[j] = (get(j / 4) >> (j % 4 * 2)) & each_byte(3);
      return;
    case Codes::kNibblesAndBit:
    case Codes::kNibbles:
      for (std::size_t j = 0; j < kQuads; ++j) {
        words[j] = (get(j % 4) >> (j / 4 * 4)) & each_byte(15);
        if (codes == Codes::kNibblesAndBit) words[j] |= ((get(4) >> j) & each_byte(1)) << 4;
      }
      return;
    case Codes::kBytes:
      for (std::size_t j = 0; j < kQuads; ++j) words[j] = get(j);
      return;
  }
}

void put_half(uint8_t* at, std::size_t c, const uint8_t* half) { std::memcpy(at + 2 * c, half, 2); }

float get_half(const uint8_t* at, std::size_t c) {
  uint16_t half;
  std::memcpy(&half, at + 2 * c, 2);
  return float_of_half(half);
}

// Four bits of a mask, one to each byte.
uint32_t spread(uint32_t four) { return (four & 1u) | (four & 2u) << 7 | (four & 4u) << 14 | (four & 8u) << 21; }

// One block of 32 of the formats without super-blocks.
void pack_simple(Format format, const Layout& layout, const uint8_t* block, std::size_t c, uint8_t* group) {
  put_half(group, c, block);
  const uint8_t* data = block + 2;
  if (layout.has_minimum) {
    put_half(group + 32, c, data);
    data += 2;
  }
  uint32_t high = 0;
  if (layout.codes == Codes::kNibblesAndBit) {
    high = word_at(data);
    data += 4;
  }
  Words words;
  for (std::size_t j = 0; j < kQuads; ++j) {
    if (format == Format::Q8_0) {
      words[j] = word_at(data + 4 * j) ^ each_byte(128);  // signed to offset
    } else {
      words[j] = (word_at(data + j % 4 * 4) >> (j / 4 * 4)) & each_byte(15);
      words[j] |= spread(high >> (4 * j)) << 4;
    }
  }
  put_codes(layout.codes, group + scale_bytes(layout), c, words);
}

// The 6-bit scale and minimum of sub-block j in the 12 bytes of Q4_K and Q5_K.
void scale_and_minimum(const uint8_t* packed, std::size_t j, uint8_t& scale, uint8_t& minimum) {
  if (j < 4) {
    scale = packed[j] & 63u;
    minimum = packed[j + 4] & 63u;
  } else {
    scale = static_cast<uint8_t>((packed[j + 4] & 15u) | ((packed[j - 4] >> 6) << 4));
    minimum = static_cast<uint8_t>((packed[j + 4] >> 4) | ((packed[j] >> 6) << 4));
  }
}

// Bits [shift, shift + width) of 32 bytes, as words of codes.
void bit_fields(const uint8_t* bytes, std::size_t shift, uint32_t mask, std::size_t to, Words& words) {
  for (std::size_t j = 0; j < kQuads; ++j) {
    words[j] |= ((word_at(bytes + 4 * j) >> shift) & each_byte(mask)) << to;
  }
}

void pack_q45_k(Format format, const Layout& layout, const uint8_t* block, std::size_t c, std::size_t j, Place place) {
  put_half(place.super, c, block);
  put_half(place.super + 32, c, block + 2);
  scale_and_minimum(block + 4, j, place.group[c], place.group[16 + c]);
  const uint8_t* high = block + 16;
  const uint8_t* low = format == Format::Q5_K ? high + 32 : high;
  Words words = {};
  bit_fields(low + j / 2 * 32, j % 2 * 4, 15, 0, words);
  if (format == Format::Q5_K) bit_fields(high, j, 1, 4, words);
  put_codes(layout.codes, place.group + scale_bytes(layout), c, words);
}

void pack_q2_k(const Layout& layout, const uint8_t* block, std::size_t c, std::size_t j, Place place) {
  put_half(place.super, c, block + 80);
  put_half(place.super + 32, c, block + 82);
  for (std::size_t s = 0; s < 2; ++s) place.group[16 * s + c] = block[2 * j + s];
  Words words = {};
  bit_fields(block + 16 + j / 4 * 32, j % 4 * 2, 3, 0, words);
  put_codes(layout.codes, place.group + scale_bytes(layout), c, words);
}

void pack_q3_k(const Layout& layout, const uint8_t* block, std::size_t c, std::size_t j, Place place) {
  const uint8_t* scales = block + 96;
  put_half(place.super, c, block + 108);
  for (std::size_t s = 0; s < 2; ++s) {
    const std::size_t i = 2 * j + s;  // 0 .. 15
    const unsigned low = i < 8 ? scales[i] & 15u : scales[i - 8] >> 4;
    const unsigned top = (scales[8 + i % 4] >> (i / 4 * 2)) & 3u;
    place.group[16 * s + c] = static_cast<uint8_t>(static_cast<int>(low | (top << 4)) - 32);
  }
  Words words = {};
  bit_fields(block + 32 + j / 4 * 32, j % 4 * 2, 3, 0, words);
  bit_fields(block, j, 1, 2, words);
  put_codes(layout.codes, place.group + scale_bytes(layout), c, words);
}

void pack_q6_k(const Layout& layout, const uint8_t* block, std::size_t c, std::size_t j, Place place) {
  put_half(place.super, c, block + 208);
  for (std::size_t s = 0; s < 2; ++s) place.group[16 * s + c] = block[192 + 2 * j + s];
  // Halves of 128: group j is part j % 4 of half j / 4.
  const std::size_t half = j / 4;
  const std::size_t part = j % 4;
  Words words = {};
  bit_fields(block + 64 * half + part % 2 * 32, part / 2 * 4, 15, 0, words);
  bit_fields(block + 128 + 32 * half, part * 2, 3, 4, words);
  put_codes(layout.codes, place.group + scale_bytes(layout), c, words);
}

void pack_group(Format format, const Layout& layout, const uint8_t* row, std::size_t group, std::size_t c,
                Place place) {
  const std::size_t super = group / 8;
  const std::size_t j = group % 8;
  switch (format) {
    case Format::Q4_0:
      return pack_simple(format, layout, row + group * 18, c, place.group);
    case Format::Q4_1:
      return pack_simple(format, layout, row + group * 20, c, place.group);
    case Format::Q5_0:
      return pack_simple(format, layout, row + group * 22, c, place.group);
    case Format::Q5_1:
      return pack_simple(format, layout, row + group * 24, c, place.group);
    case Format::Q8_0:
      return pack_simple(format, layout, row + group * 34, c, place.group);
    case Format::Q2_K:
      return pack_q2_k(layout, row + super * 84, c, j, place);
    case Format::Q3_K:
      return pack_q3_k(layout, row + super * 110, c, j, place);
    case Format::Q4_K:
      return pack_q45_k(format, layout, row + super * 144, c, j, place);
    case Format::Q5_K:
      return pack_q45_k(format, layout, row + super * 176, c, j, place);
    case Format::Q6_K:
      return pack_q6_k(layout, row + super * 210, c, j, place);
    default:
      return;
  }
}

struct Scales {
  float scale;
  float minimum;  // added
};

// As the file's own dequantisation computes them, in float32.
Scales scales_of(Format format, Place place, std::size_t c, std::size_t subgroup) {
  const uint8_t byte = place.group[16 * subgroup + c];
  switch (format) {
    case Format::Q4_1:
    case Format::Q5_1:
      return {get_half(place.group, c), get_half(place.group + 32, c)};
    case Format::Q2_K:
      return {get_half(place.super, c) * static_cast<float>(byte & 15),
              -(get_half(place.super + 32, c) * static_cast<float>(byte >> 4))};
    case Format::Q4_K:
    case Format::Q5_K:
      return {get_half(place.super, c) * static_cast<float>(byte),
              -(get_half(place.super + 32, c) * static_cast<float>(place.group[16 + c]))};
    case Format::Q3_K:
    case Format::Q6_K:
      return {get_half(place.super, c) * static_cast<float>(static_cast<int8_t>(byte)), 0.0f};
    default:
      return {get_half(place.group, c), 0.0f};
  }
}

}  // namespace

void pack_rows(Format format, const uint8_t* rows_data, std::size_t rows, std::size_t row_bytes, std::size_t inputs,
               std::size_t at, uint8_t* packed) {
  const std::size_t stride = panel_bytes(format, inputs);
  const Layout layout = layout_of(format);
  for (std::size_t row = 0; row < rows; ++row) {
    const uint8_t* data = rows_data + row * row_bytes;
    uint8_t* panel = packed + (at + row) / kPanel * stride;
    const std::size_t c = (at + row) % kPanel;
    if (is_float(format)) {
      const std::size_t width = float_bytes(format);
      for (std::size_t k = 0; k < inputs; ++k) std::memcpy(panel + (k * kPanel + c) * width, data + k * width, width);
      continue;
    }
    for (std::size_t group = 0; group < inputs / kGroup; ++group) {
      pack_group(format, layout, data, group, c, place_of(layout, panel, group));
    }
  }
}

void unpack_row(Format format, const uint8_t* packed, std::size_t inputs, std::size_t column, float* out) {
  uint8_t* panel = const_cast<uint8_t*>(packed) + column / kPanel * panel_bytes(format, inputs);
  const std::size_t c = column % kPanel;
  if (is_float(format)) {
    for (std::size_t k = 0; k < inputs; ++k) {
      const uint8_t* at = panel + (k * kPanel + c) * float_bytes(format);
      uint16_t half;
      uint32_t bits;
      if (format == Format::F32) {
        std::memcpy(out + k, at, 4);
      } else {
        std::memcpy(&half, at, 2);
        bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(out + k, &bits, 4);
        if (format == Format::F16) out[k] = float_of_half(half);
      }
    }
    return;
  }
  const Layout layout = layout_of(format);
  for (std::size_t group = 0; group < inputs / kGroup; ++group, out += kGroup) {
    const Place place = place_of(layout, panel, group);
    Words words;
    get_codes(layout.codes, place.group + scale_bytes(layout), c, words);
    for (std::size_t s = 0; s < static_cast<std::size_t>(layout.subgroups); ++s) {
      const Scales scales = scales_of(format, place, c, s);
      const std::size_t part = kGroup / static_cast<std::size_t>(layout.subgroups);
      for (std::size_t k = part * s; k < part * (s + 1); ++k) {
        const int code = static_cast<int>((words[k / 4] >> (k % 4 * 8)) & 255u) - layout.zero;
        const float value = scales.scale * static_cast<float>(code);
        out[k] = layout.has_minimum ? value + scales.minimum : value;
      }
    }
  }
}

}  // namespace octavo
