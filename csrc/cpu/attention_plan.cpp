#include "attention_plan.h"

#include <algorithm>
#include <span>
#include <utility>

#include "kernels.h"

namespace octavo {

namespace {

constexpr std::size_t kRowsPerItem = 8;   // the kernel's row block
constexpr std::size_t kSharedRows = 16;   // rows of several sequences in one item
constexpr std::size_t kTilesPerItem = 4;  // when a row's tiles are states

struct Seq {
  std::size_t index;
  std::size_t first, last;      // rows
  std::size_t lowest;           // first tile that any row sees
  std::size_t stop;             // past the last tile that any row sees, or that is before the draft tree
  std::size_t tree = SIZE_MAX;  // position where the draft tree begins
  std::size_t own = SIZE_MAX;   // tiles from here on are read for this sequence alone
  std::size_t folded = 0;       // tiles before this one are one state, since they are read together from the first on
  bool alone = false;           // all tiles are
};

class Planner {
 public:
  Planner(AttentionPlan& plan, const BatchView& batch, std::size_t window, std::size_t kv_heads, int threads,
          bool share, std::size_t max_states)
      : plan_(plan),
        batch_(batch),
        window_(window),
        kv_heads_(kv_heads),
        threads_(static_cast<std::size_t>(threads)),
        blocks_per_tile_(kTile / batch.block_size),
        row_states_(batch.tokens) {
    std::vector<Seq> few;
    for (std::size_t s = 0; s < batch.seqs; ++s) {
      const Seq seq = make(s);
      if (seq.first == seq.last) continue;
      if (seq.last - seq.first > AttentionPlan::kFewRows && seq.tree == SIZE_MAX) {
        whole(seq);
      } else {
        few.push_back(seq);
      }
    }
    seqs_ = std::move(few);
    if (share && seqs_.size() > 1) {
      std::vector<std::size_t> all(seqs_.size());
      for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
      divide(std::move(all), 0);
      for (const Range& range : ranges_) {
        if (!folds(range)) continue;
        for (std::size_t i : range.members) seqs_[i].folded = range.stop;
      }
    }
    const bool spread = threads > 1 && batch.seqs * kv_heads < 4 * static_cast<std::size_t>(threads);
    for (Seq& seq : seqs_) {
      const bool shared = seq.own != SIZE_MAX && seq.own > seq.lowest;
      const bool one = seq.last - seq.first == 1;
      if (!shared && seq.tree == SIZE_MAX && !(one && spread && seq.stop - seq.lowest > kTilesPerItem)) {
        whole(seq);
        continue;
      }
      if (seq.tree == SIZE_MAX && num_states(seq) > max_states - std::min(plan_.num_states, max_states)) {
        seq.alone = true;
        whole(seq);
        continue;
      }
      give_states(seq);
      const std::size_t from = std::max(shared ? seq.own : 0, seq.lowest);
      tiles({&seq, 1}, from, seq.stop, false);
      if (seq.tree != SIZE_MAX) tails(seq);
    }
    for (const auto& [members, from, stop] : ranges_) {
      std::vector<Seq> group;
      std::size_t lowest = SIZE_MAX;
      for (std::size_t i : members) {
        if (seqs_[i].alone) continue;
        group.push_back(seqs_[i]);
        lowest = std::min(lowest, seqs_[i].lowest);
      }
      const std::size_t begin = std::max(from, lowest);
      if (group.empty() || begin >= stop) continue;
      tiles(group, begin, stop, group.front().folded == stop);
      if (group.size() > 1) plan_.shared_tiles += (stop - begin) * kv_heads_;
    }
  }

 private:
  struct Range {
    std::vector<std::size_t> members;
    std::size_t from, stop;
  };
  // A row's states, of each KV head `count`: those of the first are number `first` and following.
  struct States {
    std::size_t first, count;
    std::size_t tile;  // of the first one, the last if it is of several
  };

  std::size_t position(std::size_t row) const { return static_cast<std::size_t>(batch_.positions[row]); }
  std::size_t lowest_tile(std::size_t row) const {
    const std::size_t p = position(row);
    return (window_ != 0 && p >= window_ ? p - window_ + 1 : 0) / kTile;
  }

  Seq make(std::size_t s) const {
    Seq seq{s, static_cast<std::size_t>(batch_.query_start_loc[s]),
            static_cast<std::size_t>(batch_.query_start_loc[s + 1]), SIZE_MAX, 0};
    for (std::size_t row = seq.first; row < seq.last; ++row) {
      seq.lowest = std::min(seq.lowest, lowest_tile(row));
      seq.stop = std::max(seq.stop, position(row) / kTile + 1);
    }
    if (batch_.tree_starts != nullptr && batch_.tree_starts[s] >= 0) {
      seq.tree = static_cast<std::size_t>(batch_.tree_starts[s]);
      seq.stop = std::min(seq.stop, seq.tree / kTile);
      seq.lowest = std::min(seq.lowest, seq.stop);
    }
    return seq;
  }

  const int32_t* blocks(const Seq& seq, std::size_t tile) const {
    return batch_.block_tables + seq.index * batch_.table_width + tile * blocks_per_tile_;
  }
  // A table may end inside its last tile.
  std::size_t blocks_in(std::size_t tile) const {
    return std::min(blocks_per_tile_, batch_.table_width - tile * blocks_per_tile_);
  }
  int compare(const Seq& a, const Seq& b, std::size_t tile) const {
    const int32_t* x = blocks(a, tile);
    const int32_t* y = blocks(b, tile);
    for (std::size_t i = 0; i < blocks_in(tile); ++i) {
      if (x[i] != y[i]) return x[i] < y[i] ? -1 : 1;
    }
    return 0;
  }

  // Sequences whose blocks are the same up to `tile`: note how far they go on together, then part them.
  void divide(std::vector<std::size_t> members, std::size_t tile) {
    std::size_t stop = tile;
    const auto together = [&](std::size_t at) {
      return std::all_of(members.begin(), members.end(), [&](std::size_t i) {
        return at < seqs_[i].stop && compare(seqs_[i], seqs_[members[0]], at) == 0;
      });
    };
    while (together(stop)) ++stop;
    if (stop > tile) ranges_.push_back({members, tile, stop});
    const auto ended =
        std::partition(members.begin(), members.end(), [&](std::size_t i) { return stop < seqs_[i].stop; });
    for (auto i = ended; i != members.end(); ++i) seqs_[*i].own = stop;
    members.erase(ended, members.end());
    std::sort(members.begin(), members.end(), [&](std::size_t a, std::size_t b) {
      const int order = compare(seqs_[a], seqs_[b], stop);
      return order != 0 ? order < 0 : a < b;
    });
    for (std::size_t begin = 0; begin < members.size();) {
      std::size_t end = begin + 1;
      while (end < members.size() && compare(seqs_[members[begin]], seqs_[members[end]], stop) == 0) ++end;
      if (end - begin == 1) {
        seqs_[members[begin]].own = stop;
      } else {
        divide(
            {members.begin() + static_cast<std::ptrdiff_t>(begin), members.begin() + static_cast<std::ptrdiff_t>(end)},
            stop);
      }
      begin = end;
    }
  }

  // All rows of a sequence, folded as they are computed.
  void whole(const Seq& seq) {
    for (std::size_t h = 0; h < kv_heads_; ++h) {
      for (std::size_t row = seq.first; row < seq.last; row += kRowsPerItem) {
        const std::size_t count = std::min(kRowsPerItem, seq.last - row);
        plan_.items.push_back({seq.index, h, plan_.rows.size(), count, 0, 0, 0, SIZE_MAX});
        for (std::size_t r = row; r < row + count; ++r) add_row(r, 0);
      }
    }
  }

  void add_row(std::size_t row, std::ptrdiff_t state) {
    plan_.rows.push_back(static_cast<int32_t>(row));
    plan_.states.push_back(state);
  }

  // Whether rows that read a range together fold its tiles as they go: a state is then written once instead of once a
  // tile, and read back. It must begin with all rows' first tile, and each KV head be work enough for a thread.
  bool folds(const Range& range) const {
    std::size_t rows = 0;
    for (std::size_t i : range.members) {
      for (std::size_t row = seqs_[i].first; row < seqs_[i].last; ++row, ++rows) {
        if (lowest_tile(row) != lowest_tile(seqs_[range.members[0]].first)) return false;
      }
    }
    const std::size_t begin = lowest_tile(seqs_[range.members[0]].first);
    if (range.from > begin || range.stop < begin + 2) return false;
    const std::size_t items = kv_heads_ * ((rows + kRowsPerItem - 1) / kRowsPerItem);
    return items % threads_ == 0 || items >= 4 * threads_;
  }

  States states_of(const Seq& seq, std::size_t row) const {
    const std::size_t lowest = lowest_tile(row);
    const std::size_t tile = seq.folded > lowest ? seq.folded - 1 : lowest;
    return {plan_.num_states, std::max(position(row) / kTile, tile) + 1 - tile, tile};
  }
  void give_states(const Seq& seq) {
    for (std::size_t row = seq.first; row < seq.last; ++row) {
      const States states = row_states_[row] = states_of(seq, row);
      for (std::size_t h = 0; h < kv_heads_; ++h) {
        plan_.folds.push_back({row, h, states.count, plan_.num_states});
        plan_.num_states += states.count;
      }
    }
  }
  std::size_t num_states(const Seq& seq) const {
    std::size_t count = 0;
    for (std::size_t row = seq.first; row < seq.last; ++row) count += states_of(seq, row).count * kv_heads_;
    return count;
  }
  std::ptrdiff_t state(std::size_t row, std::size_t kv_head) const {
    const States& states = row_states_[row];
    return static_cast<std::ptrdiff_t>(states.first + kv_head * states.count) -
           static_cast<std::ptrdiff_t>(states.tile);
  }

  // States of tiles [from, stop) of all rows of some sequences that have the same blocks there.
  void tiles(std::span<const Seq> group, std::size_t from, std::size_t stop, bool folds) {
    std::vector<std::size_t> members;
    for (const Seq& seq : group) {
      for (std::size_t row = seq.first; row < seq.last; ++row) members.push_back(row);
    }
    const std::size_t at_once = folds ? stop - from : kTilesPerItem;
    const std::size_t rows = folds ? kRowsPerItem : kSharedRows;
    for (std::size_t h = 0; h < kv_heads_; ++h) {
      for (std::size_t t = from; t < stop; t += at_once) {
        for (std::size_t begin = 0; begin < members.size(); begin += rows) {
          const std::size_t count = std::min(rows, members.size() - begin);
          plan_.items.push_back(
              {group[0].index, h, plan_.rows.size(), count, t, std::min(t + at_once, stop), 0, SIZE_MAX, folds});
          for (std::size_t i = begin; i < begin + count; ++i) add_row(members[i], state(members[i], h));
        }
      }
    }
  }

  // The tiles from the draft tree on: each row by itself, for each has other ancestors.
  void tails(const Seq& seq) {
    for (std::size_t row = seq.first; row < seq.last; ++row) {
      const std::size_t first = plan_.tails.size();
      if (position(row) >= seq.tree) {
        for (std::size_t node = row;; node = static_cast<std::size_t>(batch_.tree_parents[node])) {
          plan_.tails.push_back(batch_.slot_mapping[node]);
          if (batch_.tree_parents[node] < 0) break;
        }
        std::reverse(plan_.tails.begin() + static_cast<std::ptrdiff_t>(first), plan_.tails.end());
      }
      const std::size_t start = position(row) >= seq.tree ? seq.tree : SIZE_MAX;
      for (std::size_t h = 0; h < kv_heads_; ++h) {
        plan_.items.push_back({seq.index, h, plan_.rows.size(), 1, std::max(seq.stop, lowest_tile(row)),
                               position(row) / kTile + 1, first, start});
        add_row(row, state(row, h));
      }
    }
  }

  AttentionPlan& plan_;
  const BatchView& batch_;
  std::size_t window_, kv_heads_, threads_, blocks_per_tile_;
  std::vector<Seq> seqs_;
  std::vector<Range> ranges_;
  std::vector<States> row_states_;
};

}  // namespace

AttentionPlan::AttentionPlan(const BatchView& batch, std::size_t window, std::size_t kv_heads, int threads, bool share,
                             std::size_t max_states) {
  Planner(*this, batch, window, kv_heads, threads, share, max_states);
}

}  // namespace octavo
