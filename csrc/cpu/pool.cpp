#include "pool.h"

#include <pthread.h>

#include <algorithm>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace octavo {

namespace {

constexpr int kSpins = 20000;  // some 50 microseconds: longer than what lies between two regions of a step

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Round to nearest, no flushing of denormals, exceptions masked: a host program may have set something else.
unsigned set_float_mode() {
#if defined(__x86_64__) || defined(__i386__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80);
  return before;
#else
  return 0;
#endif
}

void restore_float_mode([[maybe_unused]] unsigned mode) {
#if defined(__x86_64__) || defined(__i386__)
  _mm_setcsr(mode);
#endif
}

std::atomic<unsigned> forks{0};  // a forked child has none of the parent's workers and must start its own

void watch_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
}

}  // namespace

struct Pool::Shared {
  // The region under way. Written by the caller before `region` moves on, read by workers after.
  Piece piece = nullptr;
  const void* body = nullptr;
  std::size_t count = 0;
  std::size_t grain = 1;
  alignas(64) std::atomic<std::size_t> next{0};
  alignas(64) std::atomic<unsigned> region{0};
  alignas(64) std::atomic<int> working{0};
  alignas(64) std::atomic<int> sleeping{0};
  std::atomic<bool> stopping{false};
  std::vector<std::thread> workers;

  void work(std::size_t thread) {
    for (;;) {
      const std::size_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      piece(body, begin, std::min(begin + grain, count), thread);
    }
  }

  void serve(std::size_t thread) {
    set_float_mode();
    unsigned seen = 0;
    for (;;) {
      int spins = 0;
      while (region.load(std::memory_order_acquire) == seen) {
        if (++spins < kSpins) {
          relax();
          continue;
        }
        sleeping.fetch_add(1);
        region.wait(seen);
        sleeping.fetch_sub(1);
      }
      seen = region.load(std::memory_order_acquire);
      if (stopping.load(std::memory_order_acquire)) return;
      work(thread);
      working.fetch_sub(1, std::memory_order_release);
    }
  }
};

Pool::Pool(int threads) : threads_(std::max(threads, 1)) { watch_forks(); }

Pool::~Pool() {
  if (shared_ == nullptr) return;
  if (forks_seen_ != forks.load(std::memory_order_relaxed)) {
    shared_.release();  // the threads are the parent's: there is nothing here to join
    return;
  }
  shared_->stopping.store(true, std::memory_order_release);
  shared_->region.fetch_add(1);
  shared_->region.notify_all();
  for (std::thread& worker : shared_->workers) worker.join();
}

void Pool::start() {
  const unsigned now = forks.load(std::memory_order_relaxed);
  if (shared_ != nullptr && forks_seen_ == now) return;
  if (shared_ != nullptr) shared_.release();
  forks_seen_ = now;
  shared_ = std::make_unique<Shared>();
  for (int i = 1; i < threads_; ++i) shared_->workers.emplace_back([shared = shared_.get(), i] { shared->serve(static_cast<std::size_t>(i)); });
}

void Pool::run(std::size_t count, std::size_t grain, Piece piece, const void* body) {
  if (threads_ == 1 || count <= grain) {
    if (count > 0) piece(body, 0, count, 0);
    return;
  }
  start();
  Shared& shared = *shared_;
  shared.piece = piece;
  shared.body = body;
  shared.count = count;
  shared.grain = grain;
  shared.next.store(0, std::memory_order_relaxed);
  shared.working.store(threads_ - 1, std::memory_order_relaxed);
  shared.region.fetch_add(1);  // sequentially consistent: a worker that goes to sleep sees it or is seen sleeping
  if (shared.sleeping.load() > 0) shared.region.notify_all();
  shared.work(0);
  for (int spins = 0; shared.working.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < kSpins) {
      relax();
    } else {
      std::this_thread::yield();  // a worker lost its processor to another program
    }
  }
}

Pool::Session::Session(Pool& pool) : lock_(pool.in_use_), saved_(set_float_mode()) {}

Pool::Session::~Session() { restore_float_mode(saved_); }

}  // namespace octavo
