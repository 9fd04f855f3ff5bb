#include "kernels.h"

#ifdef FLEXGEN_X86
#include <cpuid.h>

#define VARIANT avx512_bf16
#define TARGET __attribute__((target("avx512bf16,avx512vnni,avx512vbmi,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define FLEXGEN_DOT_BF16
#include "avx512.h"

static bool supported() {
    unsigned eax, ebx, ecx, edx;
    if (!avx512_variant.supported() || !__builtin_cpu_supports("avx512vnni") ||
        !__builtin_cpu_supports("avx512vbmi") || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx))
        return false;
    return eax & (1u << 5);
}

const Variant avx512_bf16_variant = {
    "avx512_bf16",
    supported,
    avx512_bf16::attention::attend_any,
    avx512_bf16::attention::merge_any,
    avx512_bf16::prefix::attend_any,
    avx512_bf16::groupwise::dequantise_any,
    avx512_bf16::groupwise::quantise_any,
    avx512_bf16::read,
    avx512_bf16::linear::multiply_registers,
    avx512_bf16::linear::prepare_any,
    avx512_bf16::linear::order_any,
    avx512_bf16::linear::multiply_any,
    avx512_bf16::encoded::decode_any,
    avx512_bf16::sparse::choose_any,
    avx512_bf16::sparse::attend_chosen_any,
    avx512_bf16::norms::normalise_any,
    avx512_bf16::rotation::rotate_any,
    avx512_bf16::elementwise::merge_parts_any,
    avx512_bf16::elementwise::silu_product_any,
    avx512_bf16::elementwise::add_any,
    avx512_bf16::largest::find_any,
    avx512_bf16::routing::route_any,
    avx512_bf16::routing::sum_any,
};
#endif
