// The kernels of one instruction set, as plain functions on pieces of work. graph.cpp cuts the pieces and hands them to
// threads; what a piece computes depends on its own inputs alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"
#include "philox.h"

namespace octavo {

enum class KVType : int { F32, F16, I8 };
enum class Gate : int { Silu, GeluTanh };

constexpr std::size_t kRowTile = 8;  // rows that are multiplied by a panel of weights at once

// Rows of activations for integer weights: int8 codes with a scale for each group of 32 inputs. Tiles of 8 rows, of
// which the last may have fewer, lie in the order in which kernels read them: for each group what belongs to its rows
// is side by side, so that one address and constants reach all of it.
struct Quantized {
  std::size_t rows, inputs;
  int8_t* codes;  // of a tile: [groups, rows of the tile, 32]
  float* scales;  // [groups, rows]
  // What not every format of weights needs; null if this one does not.
  float* totals;         // [groups, rows]: scale times sum of the codes, by which minima are multiplied
  int32_t* minus_sums;   // [groups, rows]: the sum of the codes, negated
  int32_t* minus_parts;  // [groups, 2, rows]: those of the first and of the last 16 codes

  static std::size_t bytes_of_group() { return 32 + 2 * sizeof(float) + 3 * sizeof(int32_t); }  // and row
  std::size_t tile_rows(std::size_t first) const { return first + kRowTile < rows ? kRowTile : rows - first; }
};

struct LinearPiece {
  Format format;
  const uint8_t* packed;
  std::size_t outputs;  // of the whole matrix
  std::size_t inputs;
  std::size_t first_panel, last_panel;
  std::size_t first_row, last_row;  // the first at a tile's edge
  const float* x;                   // [rows, inputs], for float formats
  Quantized q;                      // for integer formats
  const float* bias;                // [outputs, rounded up to whole panels] or null
  const float* residual;            // [rows, stride] or null
  float* y;                         // [rows, stride]
  std::size_t stride;
};

// K and V of one layer. A block holds, for each KV head, K transposed [D, block_size] and V [block_size, D]. In int8
// four codes at a time lie together, as products of integers take them: K [D / 4, block_size, 4], each byte 128 more
// than its code, V [block_size / 4, D, 4]. Behind a head's codes are their scales, float32: of K [groups of 32 values
// of a token, the last one maybe shorter, block_size], of V, whose values of a token share one, [block_size].
struct KVView {
  KVType type;
  uint8_t* k;
  uint8_t* v;
  std::size_t kv_heads, head_dim, block_size;

  static constexpr std::size_t kScaled = 32;  // values of K that share a scale

  std::size_t k_head_bytes() const { return head_bytes((head_dim + kScaled - 1) / kScaled); }
  std::size_t v_head_bytes() const { return head_bytes(1); }
  // Where the code of the value d of a token lies, from the head's first byte on.
  std::size_t k_code_at(std::size_t d, std::size_t offset) const { return (d / 4 * block_size + offset) * 4 + d % 4; }
  std::size_t v_code_at(std::size_t d, std::size_t offset) const {
    return (offset / 4 * head_dim + d) * 4 + offset % 4;
  }
  // Where the scale of the value d of a token lies, from the head's first byte on.
  std::size_t k_scale_at(std::size_t d, std::size_t offset) const {
    return block_size * head_dim + (d / kScaled * block_size + offset) * sizeof(float);
  }
  std::size_t v_scale_at(std::size_t offset) const { return block_size * head_dim + offset * sizeof(float); }

 private:
  std::size_t head_bytes(std::size_t scales) const {  // of a token
    const std::size_t values = block_size * head_dim;
    if (type == KVType::F32) return 4 * values;
    if (type == KVType::F16) return 2 * values;
    return values + scales * block_size * sizeof(float);
  }
};

struct AttentionPiece {
  KVView kv;
  const float* q;        // [tokens, heads * D]
  std::size_t q_stride;  // floats from one token's row to the next
  std::size_t heads;
  float scale;
  long window;                 // 0: none
  const int32_t* positions;    // [tokens]
  const int32_t* block_table;  // of the sequence, or of one of those that have the same blocks here
  const int32_t* rows;         // [num_rows] rows of q and out that this piece computes
  std::size_t num_rows;
  std::size_t kv_head;
  float* out;  // [tokens, heads * D]
  // Tiles [first_tile, last_tile) only, written as states, or folded into the state of the last (`folds`) if they are
  // the first that the rows see; last_tile 0: all tiles, folded into out.
  std::size_t first_tile, last_tile;
  bool folds;
  float* states;                     // [.., heads per KV head, 2 + D]: max, sum, out
  const std::ptrdiff_t* row_states;  // [num_rows]: a row's tile t goes to states number row_states[row] + t
  const int32_t* tail;     // slots of the positions from tail_start on: of a row of a draft tree, its ancestors
  std::size_t tail_start;  // SIZE_MAX: the block table holds them all
};

struct Kernels {
  const char* name;
  // Groups [first, last) of a row, whose values begin at x.
  void (*quantize)(const float* x, std::size_t row, std::size_t first, std::size_t last, const Quantized& to);
  void (*linear)(const LinearPiece& piece);
  // out[c] = (values of row `column`) * scale
  void (*embed)(Format format, const uint8_t* packed, std::size_t inputs, std::size_t column, float scale, float* out);
  void (*rms_norm)(const float* x, const float* weight, const float* residual, std::size_t n, float eps, float* y);
  void (*gated)(const float* x, const float* up, std::size_t n, Gate gate, float* y);
  // Rotate one head of one token, halves of the first `dim` elements; angles as cos and sin [dim / 2].
  void (*rope)(const float* x, const float* cosines, const float* sines, std::size_t dim, std::size_t head_dim,
               float* y);
  void (*store_kv)(const KVView& kv, const float* k, const float* v, std::size_t kv_head, long slot);
  void (*attention)(const AttentionPiece& piece, float* scratch);
  std::size_t (*attention_scratch)(std::size_t head_dim, std::size_t group);  // floats
  // Fold the states of one row's tiles, left to right, into out [heads per KV head, D]; the first tile's are changed.
  void (*fold)(float* states, std::size_t tiles, std::size_t group, std::size_t head_dim, float* out);
  // Rows of logits; see rows.inl.
  float (*row_max)(const float* x, std::size_t n);
  double (*row_sum_exp)(const float* x, std::size_t n, float top, float inverse_temperature);
  void (*row_shift)(const float* x, std::size_t n, double by, float* out);  // out = x - by
  // `ids` has room for last - first.
  std::size_t (*row_above)(const float* x, std::size_t first, std::size_t last, float threshold, int32_t* ids);
  std::size_t (*row_rank)(const float* x, std::size_t n, std::size_t id);
  std::size_t (*row_draw)(const float* x, std::size_t n, std::size_t start, float top, double temperature,
                          const NoiseKey& key);
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avxvnni_kernels();
const Kernels& avx512_kernels();

constexpr std::size_t kRowPiece = 1024;  // logits summed in float32 before they go into a double
constexpr std::size_t kTile = 64;        // keys
constexpr std::size_t kMostHeadDim = 1024;

}  // namespace octavo
