#define OCTAVO_ISA avxvnni

#include "kernels.inl"

namespace octavo {

const Kernels& avxvnni_kernels() { return avxvnni::kKernels; }

}  // namespace octavo
