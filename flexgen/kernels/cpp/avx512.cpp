#include "kernels.h"

#ifdef FLEXGEN_X86
#define VARIANT avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#include "avx512.h"

static bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           avx2_variant.supported();
}

const Variant avx512_variant = {
    "avx512",
    supported,
    avx512::attention::attend_any,
    avx512::attention::merge_any,
    avx512::prefix::attend_any,
    avx512::groupwise::dequantise_any,
    avx512::groupwise::quantise_any,
    avx512::read,
    avx512::linear::multiply_registers,
    avx512::linear::prepare_any,
    avx512::linear::order_any,
    avx512::linear::multiply_any,
    avx512::encoded::decode_any,
    avx512::sparse::choose_any,
    avx512::sparse::attend_chosen_any,
    avx512::norms::normalise_any,
    avx512::rotation::rotate_any,
    avx512::elementwise::merge_parts_any,
    avx512::elementwise::silu_product_any,
    avx512::elementwise::add_any,
    avx512::largest::find_any,
    avx512::routing::route_any,
    avx512::routing::sum_any,
};
#endif
