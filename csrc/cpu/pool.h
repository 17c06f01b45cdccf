// A pool of threads that spins briefly between parallel regions and then sleeps.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "read_ahead.h"

namespace octavo {

class Pool {
 public:
  // `threads` counts the caller's own; at least 1. Workers start with the first region. `pin`: worker i stays on the
  // i-th processor that the process may use; the caller's thread is its own business.
  explicit Pool(int threads, bool pin = false);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Calls body(begin, end) or body(begin, end, thread) for pieces of at most `grain` that cover [0, count), on any
  // thread (numbered below threads()), in any order; returns when all are done. What a piece computes must not depend
  // on who runs it. body must not throw.
  template <class Body>
  void parallel(std::size_t count, std::size_t grain, const Body& body) {
    run(
        count, grain,
        [](const void* b, std::size_t begin, std::size_t end, std::size_t thread) {
          if constexpr (std::is_invocable_v<const Body&, std::size_t, std::size_t, std::size_t>) {
            (*static_cast<const Body*>(b))(begin, end, thread);
          } else {
            (*static_cast<const Body*>(b))(begin, end);
          }
        },
        &body);
  }

  // Whether to add up how long threads work on pieces. To be called by who holds a session, as is the next.
  void measure(bool on) { measures_ = on; }
  std::chrono::nanoseconds take_busy();  // of all threads since the last call

  // What threads ask memory for while they wait. Announced by who holds a session.
  ReadAhead& ahead() { return *ahead_; }

  // Holds the pool for one caller over many regions, and the floating-point mode that kernels need.
  class Session {
   public:
    explicit Session(Pool& pool);
    ~Session();
    Session(const Session&) = delete;

   private:
    std::unique_lock<std::mutex> lock_;
    unsigned saved_;
  };

 private:
  using Piece = void (*)(const void*, std::size_t, std::size_t, std::size_t);
  struct Shared;

  void run(std::size_t count, std::size_t grain, Piece piece, const void* body);
  void start();

  int threads_;
  bool pin_;
  bool measures_ = false;
  std::chrono::nanoseconds alone_{0};  // that the caller worked without the others
  std::mutex in_use_;
  std::shared_ptr<ReadAhead> ahead_ = std::make_shared<ReadAhead>();
  ReadAhead::Cursor cursor_;  // the caller's
  std::unique_ptr<Shared> shared_;
  unsigned forks_seen_ = 0;
};

}  // namespace octavo
