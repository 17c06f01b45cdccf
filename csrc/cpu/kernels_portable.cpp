#define OCTAVO_ISA portable

#include "kernels.inl"

namespace octavo {

const Kernels& portable_kernels() { return portable::kKernels; }

}  // namespace octavo
