// The interface between the variants of the kernels (one per instruction set) and the rest of the module.
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

// Elements in memory. The types only select the conversion.
struct Bf16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};
enum class Type : int { float32 = 0, bfloat16 = 1, float16 = 2 };

inline int64_t element_bytes(Type type) { return type == Type::float32 ? 4 : 2; }

struct Page {
    const void *k, *v;  // each (rows, kv_heads, tokens), head_bytes for each
    int64_t begin, tokens;  // position of its first token, and its capacity
};

// Attention of the new tokens of each row, the last of its tokens. The work is divided into tasks. A task is one item (a
// row and a K/V head, with the queries of all new tokens and of all query heads that share it) over one of `splits`
// ranges of tokens.
struct Attention {
    Type type;
    const void *q;  // (rows, fresh, heads, head_dim), like out
    void *out;
    float *lse = nullptr;  // (rows, heads, fresh) or null: the log-sum-exp of the scores and the sink. With it, out is
                           // float32
    int64_t rows, heads, kv_heads, fresh, head_dim, length;
    int bits;  // of the codes in the pages (packed.h); 0 for elements of `type`
    int64_t code_group;  // elements that share a scale
    int64_t head_bytes;  // bytes of one head's key or value of one token
    const int64_t *starts;  // (rows, fresh) or null: the first token that a query attends to. They grow along a row
    const int64_t *ends;  // (rows,), the largest of them `length`; null if all are
    std::vector<Page> pages;
    float scale;
    float cap = 0.0f;  // scores become cap * tanh(score / cap); 0 for no cap
    const float *slopes = nullptr;  // (heads,) or null; a score changes by slope * (position - end + 1) (ALiBi)
    const float *sinks = nullptr;  // (heads,) or null: a score without a value, which takes part in the softmax

    int64_t splits = 1, split_tokens = 0;
    std::vector<float> partial;  // with splits, for each task: `partial_size` floats, initially zero
    std::atomic<int64_t> claimed{0};

    int64_t sharing() const { return heads / kv_heads; }  // query heads of a K/V head
    int64_t group() const { return sharing() * fresh; }  // queries of an item; those of a new token are adjacent
    int64_t queries() const { return rows * heads * fresh; }
    int64_t items() const { return rows * kv_heads; }
    int64_t tasks() const { return items() * splits; }
    // The first token that the query of a new token attends to, and the end of the tokens of a row.
    int64_t start(int64_t item, int64_t token = 0) const { return starts ? starts[item / kv_heads * fresh + token] : 0; }
    int64_t end(int64_t item) const { return ends ? ends[item / kv_heads] : length; }
    // The new token and the head of the n-th query of an item, and its index in `q` and in `lse`.
    int64_t token(int64_t n) const { return n / sharing(); }
    int64_t head(int64_t item, int64_t n) const { return item % kv_heads * sharing() + n % sharing(); }
    int64_t place(int64_t item, int64_t n) const {
        return (item / kv_heads * fresh + token(n)) * heads + head(item, n);
    }
    int64_t lse_place(int64_t item, int64_t n) const {
        return (item / kv_heads * heads + head(item, n)) * fresh + token(n);
    }
    // For each query: the maximum score, the sum of exponentials, then the weighted sum of values.
    int64_t partial_size() const { return group() * (2 + head_dim); }
};

// Attention over keys and values that all rows share, as a part of the attention over more tokens: each query is after
// all of them. A task is a K/V head, a block of its queries (all those of all rows), and one of `splits` ranges of
// tokens. Splits do not depend on the number of threads.
struct PrefixAttention {
    int64_t task_queries = 64;  // at most

    Type type;
    const void *q;  // (rows, heads, fresh, head_dim), like `out`
    const void *k, *v;  // (kv_heads, tokens, head_dim), with a stride (elements) between heads and between tokens
    float *out, *lse;  // lse (rows, heads, fresh)
    int64_t rows, heads, kv_heads, fresh, head_dim, tokens, head_stride, token_stride;
    const int64_t *first;  // (rows, fresh) or null: the first token that a query attends to, at most `tokens`
    const int64_t *positions;  // (rows,): of the first new token, relative to the first token; only with slopes
    float scale, cap;  // as in Attention
    const float *slopes;  // (heads,) or null

    // For the last `fresh` tokens of a prompt, which attend to no token after themselves: q and `prompt_out` are by token,
    // (fresh, heads, head_dim) in `type`, there is one row, `out` is not used, and `lse` may be null.
    bool causal = false;
    void *prompt_out = nullptr;
    const float *sinks = nullptr;  // (heads,) or null, as in Attention

    int64_t splits = 1, split_tokens = 0;
    std::vector<float> partial;  // with splits: for each of them, values like `out` and sums like `lse`
    std::atomic<int64_t> claimed{0};

    int64_t group() const { return heads / kv_heads; }
    int64_t queries() const { return rows * group() * fresh; }  // of a K/V head
    int64_t blocks() const { return (queries() + task_queries - 1) / task_queries; }
    int64_t tasks() const { return kv_heads * blocks() * splits; }
    // The index of a query of a K/V head in (rows, heads, fresh), or in (fresh, heads).
    int64_t place(int64_t kv_head, int64_t query) const {
        const int64_t each = group() * fresh;
        if (causal) return query % fresh * heads + kv_head * group() + query / fresh;
        return query / each * heads * fresh + kv_head * each + query % each;
    }
    int64_t head(int64_t kv_head, int64_t query) const { return kv_head * group() + query / fresh % group(); }
    // The end of the tokens that a query attends to.
    int64_t end(int64_t query) const { return causal ? tokens - fresh + query % fresh + 1 : tokens; }
    int64_t places() const { return rows * heads * fresh; }
    float *values(int64_t split) const {
        return splits == 1 ? out : (float *)partial.data() + split * places() * (head_dim + 1);
    }
    float *sums(int64_t split) const { return splits == 1 ? lse : values(split) + places() * head_dim; }
};

// The number of elements in a share of `count`; flexgen/kernels/sparse_attention.py explains why not the plain ceiling.
inline int64_t chosen_blocks(double share, int64_t count) {
    const int64_t least = (int64_t)std::ceil(share * (double)count - 1e-9);
    return std::min(std::max<int64_t>(least, 1), count);
}

// Sparse attention of one new token per row, first half: choose tokens and compute their probabilities. Tokens are
// chosen in blocks of `unit`: a share of the blocks with a cached token of the row. The new token is always chosen.
// Pages have only keys.
struct Choice {
    Type type;
    const void *q;  // (rows, heads, head_dim)
    int64_t rows, heads, kv_heads, head_dim, length;
    const int64_t *starts;  // (rows,) or null
    const int64_t *ends;  // (rows,), the largest of them `length`; null if all are
    std::vector<Page> pages;
    float scale;
    double share;
    int64_t unit, most;  // tokens of a block; the most tokens to choose
    int64_t *positions;  // (rows, kv_heads, most)
    float *weights;  // (rows, heads, most)
    std::atomic<int64_t> claimed{0};

    int64_t group() const { return heads / kv_heads; }
    int64_t items() const { return rows * kv_heads; }
    int64_t start(int64_t item) const { return starts ? starts[item / kv_heads] : 0; }
    int64_t end(int64_t item) const { return ends ? ends[item / kv_heads] : length; }
};

// The second half: the weighted sum of the chosen values. Pages have only values.
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

// Groups of consecutive values: x = q * scale + minimum. With four bits, the first half of a group is in the low
// nibbles and the second half in the high nibbles, so that a run of bytes unpacks to two runs of values.
struct Groupwise {
    Type type, scale_type;  // scale_type: bfloat16 or float16
    int bits;  // 4 or 8
    int64_t group, groups;
    void *x;  // groups * group values; read by quantise, written by dequantise
    uint8_t *packed;
    void *scales, *minimums;  // (groups,)
};

// How a published format stores W (flexgen/formats): a value is (code - zero point) * scale.
enum class Order : int {
    rows = 0,  // rows of codes
    down = 1,  // words (in / 8, out), each with consecutive values of a row: GPTQ
    across = 2,  // words (in, out / 8), each with values of eight rows: AWQ
};
enum class Code : int { int4 = 0, int8 = 1, e2m1 = 2, e4m3 = 3 };
enum class Scale : int {
    number = 0,  // of `PackedLinear.scale_type`
    power = 1,  // e8m0
    e4m3 = 2,  // times a scale of the whole matrix
};
// Ranges of rows of W in words begin at multiples of it.
constexpr int64_t ENCODED_BLOCK = 128;
struct Encoding {
    Order order;
    Code code;
    Scale scale;
    int64_t row_bytes;  // of codes, for rows of codes
    int64_t scale_rows;  // rows of W with the same scales, for rows of codes
    int added;  // to each zero point of a word
    bool divides;  // whether the scale of the matrix divides values
};

// y (rows, out) = x (rows, in) times the transpose of W (out, in), plus bias (out,) unless null. W is Groupwise, with
// groups along `in`, or with 16 bits a plain matrix of the half type `scale_type`. Sums are in float32.
struct PackedLinear {
    Type type, scale_type;  // types of x, y and bias; and of scales and minimums
    int bits;
    int64_t rows, out, in, group;
    const void *x, *bias;
    void *y;
    const uint8_t *packed;
    const void *scales, *minimums;  // (out, groups)

    bool rounded = false;  // x is rounded to int8, with a scale for each group
    // Otherwise W is in this encoding. `scales` has its layout. `minimums` are packed zero points, the scale of the
    // whole matrix, or null for integers with the zero point in the middle of their range.
    const Encoding *encoding = nullptr;

    // Set by `prepare_linear`: the rows of W that are multiplied at once, whether x has many rows (tiles.h, strips.h),
    // x in the layout of the variant, and the sums and scales of its groups if the variant needs them.
    int64_t block = 48;  // a multiple of the blocks of linear.h
    int64_t piece = 0;  // the most rows of W that a thread takes at a time, if x has many rows
    int64_t parts = 0;  // of the conversion of x, left to `order_linear`
    bool tiled = false;
    const void *operand = nullptr;
    const float *sums = nullptr, *x_scales = nullptr;
    std::vector<float> wide;

    int64_t groups() const { return in / group; }
};

// y = x / sqrt(mean of the squares of a row + eps), times weight + plus unless weight is null. With `round_first`, the
// factors are rounded to `type` before that product.
struct RmsNorm {
    Type type;
    bool round_first;
    int64_t rows, size;
    const void *x, *weight;  // (rows, size), like y; (size,)
    void *y;
    float eps, plus;
};

// Rotary positions of one token of each row, in place. Value j < half of a head and value j + half are a pair.
struct Rotation {
    Type type;  // bfloat16 or float16
    int64_t heads, head_dim, half;
    void *x;  // (rows, heads, head_dim), with `stride` elements between rows
    int64_t stride;
    const void *factors;  // (rows, 4, half): cos, cos, -sin, sin
};

// Attention over all tokens, from attention over parts of them (flexgen/kernels/partial.py).
struct PartsMerge {
    struct Part {
        const float *values, *lse;  // lse (rows, heads, fresh)
        int64_t row_stride, head_stride, token_stride;  // of values
    };
    Type type;  // of out
    int64_t heads, fresh, head_dim;
    std::vector<Part> parts;
    void *out;  // (rows, fresh, heads, head_dim)
};

// y = silu(gate) * up, row by row. y may be gate.
struct SiluProduct {
    Type type;  // bfloat16 or float16
    int64_t rows, size;
    const void *gate, *up;
    int64_t stride;  // elements between rows of gate, and of up
    void *y;
    int64_t y_stride;
};

// The index of the first of the largest values of each row, or `NO_INDEX` for a row with a NaN.
struct Largest {
    Type type;
    int64_t size;
    const void *x;  // (rows, size), with `stride` elements between rows
    int64_t stride;
    int64_t *indices;  // (rows,)
};
constexpr int64_t NO_INDEX = -1;

// The experts that a router chooses for each row of logits, and the factors of their outputs.
struct Routing {
    Type type;  // of the logits
    int64_t rows, experts, top_k;
    const void *logits;  // (rows, experts)
    const float *correction;  // (experts,) or null: added to scores for the choice only
    bool sigmoid;  // or softmax
    bool scores_all;  // whether the logits are scored before the choice, or only those of the chosen experts
    bool normalised;  // whether factors are divided by their sum, or by `least_sum` if this is larger
    float least_sum, scale;

    // Of the choices, in the order of their experts: their rows and factors. The place of each choice of each row, and
    // the end of the choices of each expert.
    int64_t *tokens;
    float *factors;
    int64_t *places;  // (rows, top_k)
    int32_t *ends;  // (experts,)
};

// The sum of the outputs x (rows * top_k, size) of each row's experts, times their factors, as in `Routing`.
struct ExpertSum {
    Type type;
    bool wide;  // whether `out` is in float32, not in `type`
    int64_t rows, top_k, size;
    const void *x;
    const float *factors;
    const int64_t *places;
    void *out;  // (rows, size)
};

struct Variant {
    const char *name;
    bool (*supported)();
    void (*attend)(Attention &);  // called on each thread; claims tasks until none are left
    void (*merge)(const Attention &);  // with splits: merges the partial results into `out`
    void (*attend_prefix)(PrefixAttention &);  // called on each thread, like `attend`
    void (*dequantise)(const Groupwise &, int64_t begin, int64_t end);  // groups
    void (*quantise)(const Groupwise &, int64_t begin, int64_t end);
    uint32_t (*read)(const uint8_t *, int64_t nbytes);  // reads every byte once; nbytes is a multiple of 1024
    int64_t (*multiply_registers)(int64_t steps);  // for benchmarks: products without memory. Returns their operations
    void (*prepare_linear)(PackedLinear &);
    void (*order_linear)(const PackedLinear &, int64_t first, int64_t last);  // parts, if `prepare_linear` left some
    void (*linear)(const PackedLinear &, int64_t begin, int64_t end);  // rows of W
    void (*decode)(const PackedLinear &, int64_t begin, int64_t end);  // rows of W with an encoding, to `y`
    void (*choose)(Choice &);  // called on each thread, like `attend`
    void (*attend_chosen)(Chosen &);
    void (*rms_norm)(const RmsNorm &, int64_t begin, int64_t end);  // rows
    void (*rotate)(const Rotation &, int64_t begin, int64_t end);  // rows
    void (*merge_parts)(const PartsMerge &, int64_t begin, int64_t end);  // new tokens of all rows
    void (*silu_product)(const SiluProduct &, int64_t begin, int64_t end);  // rows
    void (*add)(Type, void *out, const void *x, int64_t begin, int64_t end);  // out += x, elements
    void (*largest)(const Largest &, int64_t begin, int64_t end);  // rows
    void (*route)(const Routing &);
    void (*sum_experts)(const ExpertSum &, int64_t begin, int64_t end);  // rows
};

extern const Variant baseline_variant;
#ifdef FLEXGEN_X86
extern const Variant avx2_variant, avx512_variant, avx512_bf16_variant;
#endif
