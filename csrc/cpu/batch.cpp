#include "batch.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace octavo {

namespace {

void needs(bool yes) {
  if (!yes) throw std::invalid_argument("prepare: the batch does not fit");
}

// The greatest of values none of which is negative.
int32_t greatest(const std::vector<int32_t>& values) {
  int32_t most = -1;
  for (const int32_t value : values) {
    needs(value >= 0);
    most = std::max(most, value);
  }
  return most;
}

}  // namespace

Batch::Batch(BatchArrays arrays) : arrays_(std::move(arrays)) {
  const std::size_t tokens = arrays_.input_ids.size();
  const auto of_length = [](const std::vector<int32_t>& values, std::size_t size) {
    if (values.size() != size) throw std::invalid_argument("prepare: batch metadata of the wrong length");
  };
  if (arrays_.query_start_loc.empty()) throw std::invalid_argument("prepare: batch metadata of the wrong length");
  const std::size_t seqs = arrays_.query_start_loc.size() - 1;
  of_length(arrays_.positions, tokens);
  of_length(arrays_.slot_mapping, tokens);
  of_length(arrays_.block_tables, seqs * arrays_.table_width);
  if (arrays_.tree_starts.has_value() != arrays_.tree_parents.has_value()) {
    throw std::invalid_argument("prepare: starts and parents of draft trees are given together");
  }
  needs(arrays_.block_size > 0);
  view_ = {tokens,
           seqs,
           arrays_.table_width,
           arrays_.block_size,
           arrays_.input_ids.data(),
           arrays_.positions.data(),
           arrays_.query_start_loc.data(),
           arrays_.block_tables.data(),
           arrays_.slot_mapping.data()};
  if (arrays_.tree_starts) {
    of_length(*arrays_.tree_starts, seqs);
    of_length(*arrays_.tree_parents, tokens);
    view_.tree_starts = arrays_.tree_starts->data();
    view_.tree_parents = arrays_.tree_parents->data();
  }
  greatest_id_ = greatest(arrays_.input_ids);
  greatest_slot_ = greatest(arrays_.slot_mapping);
  check_tables();
  if (arrays_.tree_starts) check_trees();
}

// Rows cover the batch, and each finds its blocks in its sequence's table.
void Batch::check_tables() {
  const std::vector<int32_t>& starts = arrays_.query_start_loc;
  needs(starts.front() == 0 && static_cast<std::size_t>(starts.back()) == view_.tokens);
  needs(std::is_sorted(starts.begin(), starts.end()));
  for (std::size_t s = 0; s < view_.seqs; ++s) {
    std::size_t blocks = 0;
    for (auto t = static_cast<std::size_t>(starts[s]); t < static_cast<std::size_t>(starts[s + 1]); ++t) {
      needs(view_.positions[t] >= 0);
      blocks = std::max(blocks, static_cast<std::size_t>(view_.positions[t]) / view_.block_size + 1);
    }
    needs(blocks <= view_.table_width);
    const int32_t* table = view_.block_tables + s * view_.table_width;
    for (std::size_t b = 0; b < blocks; ++b) {
      needs(table[b] >= 0);
      greatest_block_ = std::max(greatest_block_, table[b]);
    }
  }
}

// Rows of a draft tree come after their parents, one position further; the first are at the tree's start.
void Batch::check_trees() const {
  for (std::size_t s = 0; s < view_.seqs; ++s) {
    const int32_t start = view_.tree_starts[s];
    const int32_t first = view_.query_start_loc[s];
    for (int32_t row = first; row < view_.query_start_loc[s + 1]; ++row) {
      const int32_t parent = view_.tree_parents[row];
      if (start < 0 || view_.positions[row] < start) continue;
      const bool root = parent < 0 && view_.positions[row] == start;
      const bool child = parent >= first && parent < row && view_.positions[row] == view_.positions[parent] + 1 &&
                         view_.positions[parent] >= start;
      if (!root && !child) throw std::invalid_argument("prepare: the draft tree does not fit");
    }
  }
}

bool Batch::inside(std::size_t num_blocks, std::size_t block_size) const {
  return block_size == view_.block_size && greatest_block_ < static_cast<int64_t>(num_blocks) &&
         greatest_slot_ < static_cast<int64_t>(num_blocks * block_size);
}

const AttentionPlan& Batch::plan(std::size_t window, std::size_t kv_heads, int threads, bool share,
                                 std::size_t max_states) const {
  const std::lock_guard<std::mutex> guard(mutex_);
  for (const Cut& cut : cuts_) {
    if (cut.window == window && cut.kv_heads == kv_heads && cut.threads == threads && cut.share == share &&
        cut.max_states == max_states) {
      return cut.plan;
    }
  }
  cuts_.push_back({window, kv_heads, threads, share, max_states,
                   AttentionPlan(view_, window, kv_heads, threads, share, max_states)});
  return cuts_.back().plan;
}

}  // namespace octavo
