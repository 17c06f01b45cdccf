#define OCTAVO_ISA avx2

#include "kernels.inl"

namespace octavo {

const Kernels& avx2_kernels() { return avx2::kKernels; }

}  // namespace octavo
