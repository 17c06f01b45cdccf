// All kernels of one instruction set.
#pragma once

#include <type_traits>

#include "attention.inl"
#include "elementwise.inl"
#include "linear.inl"
#include "rows.inl"

#define OCTAVO_STRING_OF(x) #x
#define OCTAVO_STRING(x) OCTAVO_STRING_OF(x)

namespace octavo::OCTAVO_ISA {

constexpr Kernels kKernels = {
    OCTAVO_STRING(OCTAVO_ISA), quantize, linear,  embed,       rms_norm,  gated,     rope,     store_kv, attention,
    attention_scratch,         fold,     row_max, row_sum_exp, row_shift, row_above, row_rank, row_draw,
};

}  // namespace octavo::OCTAVO_ISA
