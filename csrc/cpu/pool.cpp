#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <utility>

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

// Keep this thread on the n-th processor (modulo their number) that it may use. A wish: where it fails nothing is lost.
void stay_on([[maybe_unused]] int n) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  n %= std::max(CPU_COUNT(&allowed), 1);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || n-- > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    return;
  }
#endif
}

std::atomic<unsigned> forks{0};  // a forked child has none of the parent's workers and must start its own

// The locks of all pools. A fork waits until none is in use: a child would find a lock that another thread held at that
// moment locked for ever, and what it guards half done.
struct Locks {
  std::mutex mutex;
  std::vector<std::mutex*> all;
};

Locks& locks() {
  static Locks& held = *[] {
    pthread_atfork(
        [] {
          locks().mutex.lock();
          for (std::mutex* lock : locks().all) lock->lock();
        },
        [] {
          for (std::mutex* lock : locks().all) lock->unlock();
          locks().mutex.unlock();
        },
        [] {
          forks.fetch_add(1, std::memory_order_relaxed);
          for (std::mutex* lock : locks().all) lock->unlock();
          locks().mutex.unlock();
        });
    return new Locks;  // never destroyed: a program may fork while it ends
  }();
  return held;
}

constexpr uint32_t kClosed = UINT32_MAX;  // a ticket's next piece while there is none to draw

}  // namespace

// A region is a number of pieces, of which each thread has a share, one after the other: what lies together in memory
// is read by one thread. Who is done with his own share helps with the others'. Pieces are drawn from a share's ticket,
// which holds the region's number and the next piece, so a worker that comes late, because its processor went to
// another program, finds nothing to do and is waited for by nobody.
struct Pool::Shared {
  struct alignas(64) Ticket {
    std::atomic<uint64_t> value{0};  // region << 32 | next piece
    std::atomic<int64_t> busy{0};    // nanoseconds that the thread with this number has worked
  };
  // The region under way, written by the caller while the tickets are closed. A late worker may read these while they
  // change; its draw then fails: who sees a new value (acquire) also sees that the ticket it holds is out of date.
  std::atomic<Piece> piece{nullptr};
  std::atomic<const void*> body{nullptr};
  std::atomic<std::size_t> count{0};
  std::atomic<std::size_t> grain{1};
  std::atomic<bool> measures{false};
  std::vector<Ticket> tickets;                   // of each thread's share
  alignas(64) std::atomic<std::size_t> done{0};  // items of this region
  alignas(64) std::atomic<uint32_t> region{0};   // what sleeping workers wait on
  alignas(64) std::atomic<int> sleeping{0};
  std::atomic<bool> stopping{false};
  std::vector<std::thread> workers;

  const std::shared_ptr<ReadAhead> ahead;

  Shared(std::size_t threads, std::shared_ptr<ReadAhead> ahead) : tickets(threads), ahead(std::move(ahead)) {}

  // The first piece of a share; the one behind the last is the next share's first.
  std::size_t first_piece(std::size_t share, std::size_t pieces) const { return pieces * share / tickets.size(); }

  void open(uint32_t number, std::size_t items, std::size_t step, Piece run, const void* what) {
    const uint64_t ticket = static_cast<uint64_t>(number) << 32;
    for (Ticket& t : tickets) t.value.store(ticket | kClosed, std::memory_order_relaxed);
    piece.store(run, std::memory_order_release);
    body.store(what, std::memory_order_release);
    count.store(items, std::memory_order_release);
    grain.store(step, std::memory_order_release);
    done.store(0, std::memory_order_release);
    const std::size_t pieces = (items + step - 1) / step;
    for (std::size_t share = 0; share < tickets.size(); ++share) {
      tickets[share].value.store(ticket | first_piece(share, pieces), std::memory_order_release);
    }
    region.store(number);  // sequentially consistent: a worker that goes to sleep sees it or is seen sleeping
    if (sleeping.load() > 0) region.notify_all();
  }

  void work(std::size_t thread) {
    for (std::size_t i = 0; i < tickets.size(); ++i) work_on((thread + i) % tickets.size(), thread);
  }

  void work_on(std::size_t share, std::size_t thread) {
    std::atomic<uint64_t>& ticket = tickets[share].value;
    uint64_t drawn = ticket.load(std::memory_order_acquire);
    for (;;) {
      const std::size_t items = count.load(std::memory_order_acquire);
      const std::size_t step = grain.load(std::memory_order_acquire);
      const Piece run = piece.load(std::memory_order_acquire);
      const void* what = body.load(std::memory_order_acquire);
      const std::size_t next = static_cast<uint32_t>(drawn);
      if (next == kClosed || next >= first_piece(share + 1, (items + step - 1) / step)) return;
      if (!ticket.compare_exchange_weak(drawn, drawn + 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      const std::size_t end = std::min((next + 1) * step, items);
      if (measures.load(std::memory_order_relaxed)) {
        const auto started = std::chrono::steady_clock::now();
        run(what, next * step, end, thread);
        tickets[thread].busy.fetch_add((std::chrono::steady_clock::now() - started) / std::chrono::nanoseconds(1),
                                       std::memory_order_relaxed);
      } else {
        run(what, next * step, end, thread);
      }
      done.fetch_add(end - next * step, std::memory_order_release);
      drawn = ticket.load(std::memory_order_acquire);
    }
  }

  void serve(std::size_t thread) {
    set_float_mode();
    ReadAhead::Cursor cursor;
    uint32_t seen = 0;
    for (;;) {
      int spins = 0;
      while (region.load(std::memory_order_acquire) == seen) {
        if (ahead->read_some(thread, tickets.size(), cursor)) continue;
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
    }
  }
};

Pool::Pool(int threads, bool pin) : threads_(std::max(threads, 1)), pin_(pin) {
  const std::lock_guard<std::mutex> guard(locks().mutex);
  locks().all.push_back(&in_use_);
}

Pool::~Pool() {
  {
    const std::lock_guard<std::mutex> guard(locks().mutex);
    std::erase(locks().all, &in_use_);
  }
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
  shared_ = std::make_unique<Shared>(static_cast<std::size_t>(threads_), ahead_);
  for (int i = 1; i < threads_; ++i)
    shared_->workers.emplace_back([shared = shared_.get(), i, pin = pin_] {
      if (pin) stay_on(i);
      shared->serve(static_cast<std::size_t>(i));
    });
}

void Pool::run(std::size_t count, std::size_t grain, Piece piece, const void* body) {
  if (count == 0) return;
  if (threads_ == 1 || count <= grain) {
    const auto started = measures_ ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point{};
    piece(body, 0, count, 0);
    if (measures_) alone_ += std::chrono::steady_clock::now() - started;
    return;
  }
  start();
  Shared& shared = *shared_;
  shared.measures.store(measures_, std::memory_order_relaxed);
  shared.open(shared.region.load(std::memory_order_relaxed) + 1, count, grain, piece, body);
  shared.work(0);
  for (int spins = 0; shared.done.load(std::memory_order_acquire) < count; ++spins) {
    if (ahead_->read_some(0, static_cast<std::size_t>(threads_), cursor_)) continue;
    if (spins < kSpins) {
      relax();
    } else {
      std::this_thread::yield();  // a worker lost its processor in the midst of a piece
    }
  }
}

std::chrono::nanoseconds Pool::take_busy() {
  std::chrono::nanoseconds busy = std::exchange(alone_, {});
  if (shared_ == nullptr) return busy;
  for (Shared::Ticket& ticket : shared_->tickets) busy += std::chrono::nanoseconds(ticket.busy.exchange(0));
  return busy;
}

Pool::Session::Session(Pool& pool) : lock_(pool.in_use_), saved_(set_float_mode()) {}

Pool::Session::~Session() { restore_float_mode(saved_); }

}  // namespace octavo
