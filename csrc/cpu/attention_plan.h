// How the attention of a step is cut into pieces of work. What a piece computes of a row does not depend on the cut:
// work is divided at the edges of tiles only, and a row's tiles are folded left to right.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace octavo {

// What a batch holds; see octavo.ops.Batch. Block tables that are long enough, and trees that are trees, see Batch.
struct BatchView {
  std::size_t tokens = 0, seqs = 0, table_width = 0, block_size = 0;
  const int32_t* input_ids = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* query_start_loc = nullptr;
  const int32_t* block_tables = nullptr;
  const int32_t* slot_mapping = nullptr;
  const int32_t* tree_starts = nullptr;   // null: no sequence has a draft tree
  const int32_t* tree_parents = nullptr;  // beside tree_starts
};

struct AttentionPlan {
  // Sequences with more rows compute enough with each key to read it by themselves: they have no states.
  static constexpr std::size_t kFewRows = 8;

  // Rows that see the same blocks in tiles [first_tile, last_tile), and one KV head.
  struct Item {
    std::size_t seq;  // whose block table to read
    std::size_t kv_head;
    std::size_t first, count;           // of `rows` and `states`
    std::size_t first_tile, last_tile;  // last_tile 0: all that the rows see, folded into the output at once
    std::size_t tail, tail_start;       // the first of `tails` is of position tail_start; SIZE_MAX: there is no tail
    bool folds = false;                 // the tiles, a row's first, into the state of the last
  };
  // States of one row, of a tile each, but for the first, which may be of several; to be folded into the output.
  struct Fold {
    std::size_t row, kv_head, states, state;
  };
  std::vector<Item> items;
  std::vector<int32_t> rows;           // of the items, one after the other
  std::vector<std::ptrdiff_t> states;  // beside `rows`: where the state of tile 0 would be
  std::vector<int32_t> tails;          // slots of a row's ancestors in its draft tree, by position
  std::vector<Fold> folds;
  std::size_t num_states = 0;
  std::size_t shared_tiles = 0;  // tiles that rows of several sequences read together, of one KV head

  // With at most `max_states` states, besides those of draft trees: rows that would need more read all by themselves.
  AttentionPlan(const BatchView& batch, std::size_t window, std::size_t kv_heads, int threads, bool share,
                std::size_t max_states);
};

}  // namespace octavo
