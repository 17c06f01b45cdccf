// Packed weights in a file and back: their segments one after the other, as they lie in memory.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "graph.h"

namespace octavo {

// Writes all segments from `offset` on and returns a checksum of them. Throws std::system_error; of ECANCELED once
// `stop` is not 0, which another thread may change.
uint64_t write_weights(const std::vector<std::shared_ptr<Weight>>& weights, int fd, uint64_t offset,
                       const volatile uint8_t* stop);

// Reads what write_weights wrote into weights that were not packed yet, and returns the checksum of what was read.
// Throws std::system_error, also where the file ends too early; the weights are then as if nothing had been read.
// On the caller's thread alone: it is bound by memory, and while it runs a start needs the other processors.
uint64_t read_weights(const std::vector<std::shared_ptr<Weight>>& weights, int fd, uint64_t offset);

}  // namespace octavo
