// The metadata of a ragged batch; see octavo.ops.Batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>
#include <optional>
#include <vector>

#include "attention_plan.h"

namespace octavo {

struct BatchArrays {
  std::vector<int32_t> input_ids, positions, query_start_loc, block_tables, slot_mapping;
  std::size_t table_width, block_size;
  std::optional<std::vector<int32_t>> tree_starts, tree_parents;
};

// One step's metadata, checked once; many ops may read it at a time.
class Batch {
 public:
  // Throws std::invalid_argument if the arrays do not fit each other.
  explicit Batch(BatchArrays arrays);
  Batch(const Batch&) = delete;

  const BatchView& view() const { return view_; }
  int32_t greatest_id() const { return greatest_id_; }  // -1: there are no tokens

  // Whether all of its blocks and slots are in a pool of so many blocks.
  bool inside(std::size_t num_blocks, std::size_t block_size) const;

  // How the attention of layers with these properties is cut; made when it is asked for the first time.
  const AttentionPlan& plan(std::size_t window, std::size_t kv_heads, int threads, bool share,
                            std::size_t max_states) const;

 private:
  struct Cut {
    std::size_t window, kv_heads;
    int threads;
    bool share;
    std::size_t max_states;
    AttentionPlan plan;
  };

  void check_tables();
  void check_trees() const;

  BatchArrays arrays_;
  BatchView view_;
  int32_t greatest_id_ = -1, greatest_slot_ = -1, greatest_block_ = -1;
  mutable std::mutex mutex_;
  mutable std::list<Cut> cuts_;  // a list: those that were given out stay where they are
};

}  // namespace octavo
