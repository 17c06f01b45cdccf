#define OCTAVO_ISA avx512

#include "kernels.inl"

namespace octavo {

const Kernels& avx512_kernels() { return avx512::kKernels; }

}  // namespace octavo
