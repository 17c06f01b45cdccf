// Packed weights: the file's codes and scales, put in another order and nothing else.
//
// A matrix [N, K] is cut into panels of 16 outputs (columns of x @ W^T), padded with zeros; a panel into groups of 32
// inputs. A group holds its scales and then its codes, in the order in which kernels read them: "quad" j of a group is
// 64 bytes, for each of the 16 outputs the four codes of inputs 4j .. 4j + 3. Formats with super-blocks of 256 put what
// 8 groups share before them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo {

constexpr std::size_t kPanel = 16;  // outputs
constexpr std::size_t kGroup = 32;  // inputs
constexpr std::size_t kQuads = kGroup / 4;

enum class Format : int { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K };

// How codes lie in a group.
enum class Codes { kTwo, kNibbles, kNibblesAndBit, kBytes };

// What a group's weight is made of: weight = scale * (code - zero) - or + minimum.
struct Layout {
  Codes codes;
  int zero;  // subtracted from every code
  int max_code;
  bool has_minimum;
  int groups_per_super;  // 1: no super-blocks
  int subgroups;         // scales per group: 1 for 32 inputs, 2 for 16 each
  std::size_t code_bytes;
  std::size_t group_bytes;  // scales and codes
  std::size_t super_bytes;  // what groups_per_super groups share, before them

  // What a product needs of the activations beside codes and scales; see Quantized.
  constexpr bool needs_totals() const { return has_minimum && subgroups == 1; }
  constexpr bool needs_sums() const { return zero != 0 && subgroups == 1; }
  constexpr bool needs_parts() const { return subgroups == 2; }

  constexpr std::size_t panel_bytes(std::size_t inputs) const {
    const std::size_t groups = inputs / kGroup;
    return groups * group_bytes + groups / groups_per_super * super_bytes;
  }
};

constexpr std::size_t code_bytes_of(Codes codes) {
  switch (codes) {
    case Codes::kTwo:
      return 128;
    case Codes::kNibbles:
      return 256;
    case Codes::kNibblesAndBit:
      return 320;
    default:
      return 512;
  }
}

constexpr Layout simple(Codes codes, int zero, int max_code, bool has_minimum) {
  const std::size_t bytes = code_bytes_of(codes);
  return {codes, zero, max_code, has_minimum, 1, 1, bytes, bytes + (has_minimum || codes == Codes::kBytes ? 64u : 32u),
          0};
}

// scale_bytes: of a group, all its subgroups.
constexpr Layout super(Codes codes, int zero, int max_code, bool has_minimum, int subgroups, std::size_t scale_bytes) {
  const std::size_t bytes = code_bytes_of(codes);
  return {codes, zero, max_code, has_minimum, 8, subgroups, bytes, bytes + scale_bytes, has_minimum ? 64u : 32u};
}

constexpr Layout layout_of(Format format) {
  switch (format) {
    case Format::Q4_0:
      return simple(Codes::kNibbles, 8, 15, false);
    case Format::Q4_1:
      return simple(Codes::kNibbles, 0, 15, true);
    case Format::Q5_0:
      return simple(Codes::kNibblesAndBit, 16, 31, false);
    case Format::Q5_1:
      return simple(Codes::kNibblesAndBit, 0, 31, true);
    case Format::Q8_0:
      return simple(Codes::kBytes, 128, 255, false);
    case Format::Q2_K:
      return super(Codes::kTwo, 0, 3, true, 2, 32);  // scale and minimum in one byte
    case Format::Q3_K:
      return super(Codes::kNibbles, 4, 7, false, 2, 32);  // signed scale byte
    case Format::Q4_K:
      return super(Codes::kNibbles, 0, 15, true, 1, 32);  // scale byte, minimum byte
    case Format::Q5_K:
      return super(Codes::kNibblesAndBit, 0, 31, true, 1, 32);
    case Format::Q6_K:
      return super(Codes::kBytes, 32, 63, false, 2, 32);  // signed scale byte
    default:
      return {};
  }
}

constexpr bool is_float(Format format) {
  return format == Format::F32 || format == Format::F16 || format == Format::BF16;
}

constexpr std::size_t float_bytes(Format format) { return format == Format::F32 ? 4 : 2; }

constexpr std::size_t panels_of(std::size_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// Bytes of one panel of a matrix with so many inputs. Of float formats: [K][16] values.
constexpr std::size_t panel_bytes(Format format, std::size_t inputs) {
  return is_float(format) ? inputs * kPanel * float_bytes(format) : layout_of(format).panel_bytes(inputs);
}

// Half precision without hardware help, exact both ways (to nearest, ties to even).
float float_of_half(uint16_t half);
uint16_t half_of_float(float value);

// Pack rows [first, first + rows) of the file's tensor (GGUF layout, `row_bytes` a row) as outputs of the packed
// matrix, beginning at output `at`. Panels not fully covered keep what they have: callers zero the memory first.
void pack_rows(Format format, const uint8_t* rows_data, std::size_t rows, std::size_t row_bytes, std::size_t inputs,
               std::size_t at, uint8_t* packed);

// The values of output `column` of a packed matrix, float32 [inputs]: the inverse of packing and dequantising.
void unpack_row(Format format, const uint8_t* packed, std::size_t inputs, std::size_t column, float* out);

}  // namespace octavo
