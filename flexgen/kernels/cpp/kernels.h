// What the variants of the kernels (one per instruction set) share with the rest of the module.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#define FLEXGEN_X86 1
#endif

// Elements as they lie in memory; the types only choose the conversion.
struct Bf16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};
enum class Type : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct Page {
    const void *k, *v;  // each (rows, kv_heads, tokens), head_bytes for each
    int64_t begin, tokens;  // position of its first token, and its capacity
};

// Attention of one new token per row. Its work is cut into tasks: one item (a row and a K/V head, with all
// query heads that share it) over one of `splits` ranges of tokens.
struct Attention {
    Type type;
    const void *q;  // (rows, heads, head_dim), as is out
    void *out;
    int64_t rows, heads, kv_heads, head_dim, length;
    int bits;  // of the codes in the pages (packed.h); 0 where they hold elements of `type`
    int64_t code_group;  // elements that share a scale
    int64_t head_bytes;  // of one head's key, or value, of one token
    const int64_t *starts;  // (rows,) or null
    std::vector<Page> pages;
    float scale;

    int64_t splits = 1, split_tokens = 0;
    std::vector<float> partial;  // per task, where there are splits: `partial_size` floats, zero at first
    std::atomic<int64_t> claimed{0};

    int64_t group() const { return heads / kv_heads; }
    int64_t items() const { return rows * kv_heads; }
    int64_t tasks() const { return items() * splits; }
    int64_t start(int64_t item) const { return starts ? starts[item / kv_heads] : 0; }
    // Per query head: the maximum score, the sum of exponentials, then the weighted sum of values.
    int64_t partial_size() const { return group() * (2 + head_dim); }
};

// How many of `count` are kept of a share of them; flexgen/kernels/sparse_attention.py says why not the plain ceiling.
inline int64_t kept(double share, int64_t count) {
    const int64_t least = (int64_t)std::ceil(share * (double)count - 1e-9);
    return std::min(std::max<int64_t>(least, 1), count);
}

// Sparse attention of one new token per row, first half: which tokens, and the probabilities of those. Tokens
// are chosen in blocks of `unit`, a share of the blocks that hold a cached token of the row; the new token is
// always taken. Pages have keys only.
struct Choice {
    Type type;
    const void *q;  // (rows, heads, head_dim)
    int64_t rows, heads, kv_heads, head_dim, length;
    const int64_t *starts;  // (rows,) or null
    std::vector<Page> pages;
    float scale;
    double share;
    int64_t unit, most;  // tokens: of a block, and taken at most
    int64_t *positions;  // (rows, kv_heads, most)
    float *weights;  // (rows, heads, most)
    std::atomic<int64_t> claimed{0};

    int64_t group() const { return heads / kv_heads; }
    int64_t items() const { return rows * kv_heads; }
    int64_t start(int64_t item) const { return starts ? starts[item / kv_heads] : 0; }
};

// The second half: the sum of their values. Pages have values only.
struct Chosen {
    Type type;
    int64_t rows, heads, kv_heads, head_dim, most;
    const int64_t *positions;
    const float *weights;
    std::vector<Page> pages;
    void *out;  // (rows, heads, head_dim)
    std::atomic<int64_t> claimed{0};

    int64_t group() const { return heads / kv_heads; }
    int64_t items() const { return rows * kv_heads; }
};

// Groups of consecutive values: x = q * scale + minimum. In four bits, the first half of a group has the low
// nibbles and the second half the high ones, so that a run of bytes unpacks to two runs of values.
struct Groupwise {
    Type type, scale_type;  // scale_type: bfloat16 or float16
    int bits;  // 4 or 8
    int64_t group, groups;
    void *x;  // groups * group values; read by quantise, written by dequantise
    uint8_t *packed;
    void *scales, *minimums;  // (groups,)
};

// y (rows, out) = x (rows, in) times the transpose of W (out, in), plus bias (out,) unless null. W is Groupwise,
// its groups along `in`; or, with 16 bits, as it is in the half type `scale_type`. Sums are in float32.
struct PackedLinear {
    Type type, scale_type;  // of x, y and bias; of scales and minimums
    int bits;
    int64_t rows, out, in, group;
    const void *x, *bias;
    void *y;
    const uint8_t *packed;
    const void *scales, *minimums;  // (out, groups)

    // Made by `prepare_linear`: whether rows of x are many (tiles.h), x as the variant multiplies it, and its group sums
    // where the variant needs them.
    bool tiled = false;
    const void *operand = nullptr;
    const float *sums = nullptr;
    std::vector<float> wide;

    int64_t groups() const { return in / group; }
};

struct Variant {
    const char *name;
    bool (*supported)();
    void (*attend)(Attention &);  // on each thread: claims tasks until there are none
    void (*merge)(const Attention &);  // where there are splits: the partial results to `out`
    void (*dequantise)(const Groupwise &, int64_t begin, int64_t end);  // groups
    void (*quantise)(const Groupwise &, int64_t begin, int64_t end);
    uint32_t (*read)(const uint8_t *, int64_t nbytes);  // every byte once; a multiple of 1024
    void (*prepare_linear)(PackedLinear &);
    void (*linear)(const PackedLinear &, int64_t begin, int64_t end);  // rows of W
    void (*choose)(Choice &);  // on each thread, as `attend`
    void (*attend_chosen)(Chosen &);
};

extern const Variant baseline_variant;
#ifdef FLEXGEN_X86
extern const Variant avx2_variant, avx512_variant, avx512_bf16_variant;
#endif
