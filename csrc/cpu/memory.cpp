#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>

namespace octavo {

namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kLargePage = std::size_t{2} << 20;
constexpr std::size_t kChunk = 16 * kLargePage;

std::size_t rounded(std::size_t size, std::size_t unit) {
  const std::size_t units = size / unit + (size % unit != 0);
  if (units > SIZE_MAX / unit) throw std::bad_alloc();
  return units * unit;
}

// Straight from the system: zeros.
std::shared_ptr<uint8_t> mapped(std::size_t size) {
  void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  return {static_cast<uint8_t*>(pages), [size](uint8_t* p) { munmap(p, size); }};
}

// Zeros on pages of 2 MiB where the system has them: a processor keeps the addresses of some thousand pages at hand,
// and weights on small ones are many times that.
std::shared_ptr<uint8_t> on_large_pages(std::size_t size) {
  const std::shared_ptr<uint8_t> whole = mapped(rounded(size, kLargePage) + kLargePage);
  const auto at = reinterpret_cast<std::uintptr_t>(whole.get());
  uint8_t* begin = whole.get() + (kLargePage - at % kLargePage) % kLargePage;
#if defined(MADV_HUGEPAGE)
  madvise(begin, rounded(size, kLargePage), MADV_HUGEPAGE);
#endif
  return {whole, begin};
}

// A place in a chunk that several share; the chunk goes with the last of them. What is too large for that has pages of
// its own.
std::shared_ptr<uint8_t> packed(std::size_t size) {
  static std::mutex mutex;
  static std::weak_ptr<uint8_t> current;
  static std::size_t used;
  if (size > kChunk / 4) return on_large_pages(size);
  const std::lock_guard<std::mutex> guard(mutex);
  std::shared_ptr<uint8_t> chunk = current.lock();
  if (chunk == nullptr || size > kChunk - used) {
    chunk = on_large_pages(kChunk);
    current = chunk;
    used = 0;
  }
  uint8_t* begin = chunk.get() + used;
  used += rounded(size, kLine);
  return {chunk, begin};
}

std::shared_ptr<uint8_t> plain(std::size_t size) {
  auto* data = static_cast<uint8_t*>(std::aligned_alloc(kLine, rounded(size, kLine)));
  if (data == nullptr) throw std::bad_alloc();
  return {data, [](uint8_t* p) { std::free(p); }};
}

}  // namespace

Bytes::Bytes(std::size_t size, Kind kind) : size_(size) {
  if (size == 0) return;
  data_ = kind == Kind::kPlain ? plain(size) : kind == Kind::kLazy ? mapped(size) : packed(size);
}

void Bytes::grow(std::size_t size) {
  if (size > size_) *this = Bytes(size);
}

}  // namespace octavo
