// The metadata of a batch; see octavo.ops.Batch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace octavo {

struct BatchView {
  std::size_t tokens = 0, seqs = 0, table_width = 0;
  const int32_t* input_ids = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* query_start_loc = nullptr;
  const int32_t* seq_lens = nullptr;
  const int32_t* block_tables = nullptr;
  const int32_t* slot_mapping = nullptr;
  const int32_t* tree_starts = nullptr;   // null: no sequence has a draft tree
  const int32_t* tree_parents = nullptr;  // beside tree_starts
};

}  // namespace octavo
