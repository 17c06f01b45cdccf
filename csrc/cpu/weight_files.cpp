#include "weight_files.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace octavo {

namespace {

constexpr std::size_t kPiece = std::size_t{512} << 10;  // bytes of a checksum of its own: it finds them in the cache

struct Piece {
  uint8_t* data;
  std::size_t size;
  uint64_t at;  // in the file
};

std::vector<Piece> pieces_of(const std::vector<std::shared_ptr<Weight>>& weights, uint64_t offset) {
  std::vector<Piece> pieces;
  for (const auto& weight : weights) {
    for (const Weight::Segment& segment : weight->segments) {
      for (std::size_t done = 0; done < segment.packed_bytes; done += kPiece) {
        const std::size_t size = std::min(kPiece, segment.packed_bytes - done);
        pieces.push_back({segment.packed.data() + done, size, offset});
        offset += size;
      }
    }
  }
  return pieces;
}

// Turns and multiplies words in four lanes: it finds damage, as fast as memory is read, and is no signature.
uint64_t checksum_of(const uint8_t* data, std::size_t size) {
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;
  uint64_t lanes[4] = {1, 2, 3, 4};
  std::size_t i = 0;
  for (; i + 32 <= size; i += 32) {
    uint64_t words[4];
    std::memcpy(words, data + i, 32);
    for (int l = 0; l < 4; ++l) lanes[l] = std::rotl(lanes[l] ^ words[l], 29) * kOdd;
  }
  uint64_t sum = size;
  for (; i < size; ++i) sum = (sum ^ data[i]) * kOdd;
  for (const uint64_t lane : lanes) sum = (sum ^ (lane >> 29) ^ lane) * kOdd;
  return sum;
}

uint64_t joined(const std::vector<uint64_t>& sums) {
  return checksum_of(reinterpret_cast<const uint8_t*>(sums.data()), sums.size() * sizeof(uint64_t));
}

}  // namespace

uint64_t write_weights(const std::vector<std::shared_ptr<Weight>>& weights, int fd, uint64_t offset,
                       const volatile uint8_t* stop) {
  std::vector<uint64_t> sums;
  for (const Piece& piece : pieces_of(weights, offset)) {
    if (*stop != 0) throw std::system_error(ECANCELED, std::generic_category());
    for (std::size_t done = 0; done < piece.size;) {
      const ssize_t count = pwrite(fd, piece.data + done, piece.size - done, static_cast<off_t>(piece.at + done));
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) throw std::system_error(count < 0 ? errno : ENOSPC, std::generic_category());
      done += static_cast<std::size_t>(count);
    }
    sums.push_back(checksum_of(piece.data, piece.size));
  }
  return joined(sums);
}

uint64_t read_weights(const std::vector<std::shared_ptr<Weight>>& weights, int fd, uint64_t offset) {
  for (const auto& weight : weights) weight->allocate();
  std::vector<uint64_t> sums;
  for (const Piece& piece : pieces_of(weights, offset)) {
    for (std::size_t done = 0; done < piece.size;) {
      const ssize_t count = pread(fd, piece.data + done, piece.size - done, static_cast<off_t>(piece.at + done));
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) {
        const int problem = count < 0 ? errno : EIO;
        for (const auto& weight : weights) weight->release();
        throw std::system_error(problem, std::generic_category());
      }
      done += static_cast<std::size_t>(count);
    }
    sums.push_back(checksum_of(piece.data, piece.size));
  }
  return joined(sums);
}

}  // namespace octavo
