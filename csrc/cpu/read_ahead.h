// Weights that will be read soon, asked for by threads that wait: while one thread works, memory need not be idle.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace octavo {

// Weights of the linear ops of a graph, in the order in which they run, and the graph that ran after it the last time.
struct WeightRanges {
  struct Range {
    const uint8_t* begin;
    std::size_t bytes;
  };
  std::vector<Range> ranges;
  std::weak_ptr<WeightRanges> next;
};

// Who computes announces what comes next; any thread reads ahead. All of it is a guess: what is asked for in vain, or
// while it changes, costs time and no more, and an address that is no longer memory does no harm.
class ReadAhead {
 public:
  // Of one thread: the number of a range, and how much of the thread's share of it was asked for.
  struct Cursor {
    uint64_t number = 0;
    std::size_t offset = 0;
  };

  // A graph begins to run.
  void begin(const std::shared_ptr<WeightRanges>& graph) {
    if (now_ != nullptr) now_->next = graph;
    const bool guessed = expected_.lock() == graph;
    if (now_ != nullptr) first_number_ += now_->ranges.size();
    if (!guessed) first_number_ += kAhead;  // what was announced beyond is of no graph that runs
    now_ = graph;
    expected_ = graph->next;
    for (std::size_t i = 0; i < kAhead; ++i) put(i);
    first_.store(first_number_, std::memory_order_release);
  }

  // Its linear op number `linear` is about to run.
  void pass(std::size_t linear) {
    put(linear + kAhead);
    first_.store(first_number_ + linear + 1, std::memory_order_release);
  }

  // Asks for a little of a thread's share. False if there is nothing left to ask for.
  bool read_some(std::size_t thread, std::size_t threads, Cursor& cursor) const {
    const uint64_t first = first_.load(std::memory_order_acquire);
    if (first == 0) return false;
    if (cursor.number < first || cursor.number > first + kAhead) cursor = {first, 0};
    std::size_t before = cursor.offset;
    for (uint64_t n = first; n < cursor.number; ++n) before += share(n, thread, threads).bytes;
    if (cursor.number == first + kAhead || before >= kMostBytes) return false;
    const WeightRanges::Range own = share(cursor.number, thread, threads);
    if (cursor.offset >= own.bytes) {
      cursor = {cursor.number + 1, 0};
      return true;
    }
    const std::size_t end = std::min(cursor.offset + kLines * 64, own.bytes);
    for (; cursor.offset < end; cursor.offset += 64) __builtin_prefetch(own.begin + cursor.offset, 0, 2);
    return true;
  }

 private:
  static constexpr std::size_t kAhead = 8;            // linear ops
  static constexpr std::size_t kMostBytes = 2 << 20;  // of a thread: what caches hold until it is read
  static constexpr std::size_t kLines = 8;            // at a time, so that a thread is back soon
  struct Slot {
    std::atomic<const uint8_t*> begin{nullptr};
    std::atomic<std::size_t> bytes{0};
  };

  void put(std::size_t linear) {
    Slot& slot = slots_[(first_number_ + linear) % slots_.size()];
    const WeightRanges* graph = now_.get();
    std::shared_ptr<WeightRanges> next;
    if (linear >= graph->ranges.size()) {
      linear -= graph->ranges.size();
      next = expected_.lock();
      graph = next.get();
    }
    const bool known = graph != nullptr && linear < graph->ranges.size();
    slot.begin.store(known ? graph->ranges[linear].begin : nullptr, std::memory_order_relaxed);
    slot.bytes.store(known ? graph->ranges[linear].bytes : 0, std::memory_order_relaxed);
  }

  // Whole lines, so that threads do not ask for the same.
  WeightRanges::Range share(uint64_t number, std::size_t thread, std::size_t threads) const {
    const Slot& slot = slots_[number % slots_.size()];
    const std::size_t lines = slot.bytes.load(std::memory_order_relaxed) / 64;
    const std::size_t from = lines * thread / threads;
    return {slot.begin.load(std::memory_order_relaxed) + from * 64, (lines * (thread + 1) / threads - from) * 64};
  }

  std::array<Slot, 2 * kAhead> slots_;
  alignas(64) std::atomic<uint64_t> first_{0};  // number of the next op that has not begun; 0: nothing was announced
  // Of who announces.
  uint64_t first_number_ = 1;
  std::shared_ptr<WeightRanges> now_;
  std::weak_ptr<WeightRanges> expected_;
};

}  // namespace octavo
