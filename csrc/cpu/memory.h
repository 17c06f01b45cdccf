// Memory for weights, KV and what lies between ops.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace octavo {

// Memory on 64-byte lines; the owner of it. Throws std::bad_alloc.
class Bytes {
 public:
  enum class Kind {
    kPlain,   // not initialised
    kLazy,    // zeros that cost nothing until they are touched
    kPacked,  // zeros, side by side with others of this kind on large pages: for what is read from end to end
  };
  Bytes() = default;
  explicit Bytes(std::size_t size, Kind kind = Kind::kPlain);
  uint8_t* data() const { return data_.get(); }
  std::size_t size() const { return size_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  void grow(std::size_t size);  // at least; what was there is lost

 private:
  std::shared_ptr<uint8_t> data_;
  std::size_t size_ = 0;
};

}  // namespace octavo
