// Pages of group-wise integers, dequantised in registers.
//
// A head's key or value is one run of bytes: a float16 scale and minimum for each group of its elements, then the codes
// of each group, with x = code * scale + minimum (flexgen/kernels/heads.py, groupwise.h). Scale and minimum are not
// applied to each element. With a query q and the probabilities p:
//     key . q   = sum over groups of  scale * (codes . q) + minimum * (sum of q)
//     p . value = sum over tokens of  (p * scale) * codes + p * minimum
// So an element costs the same as a bfloat16 element: a conversion and a multiplication.
//
// Codes are processed in memory order: a vector of LANES bytes gives 8 / BITS operands. Queries are converted to this
// order once, and sums are converted back once at the end.
#pragma once

#include "blocks.h"

namespace VARIANT {
namespace attention {

// The element type of packed pages.
template <int B>
struct Codes {
    static constexpr int BITS = B;
};
template <class K>
constexpr int bits_of = 0;
template <int B>
constexpr int bits_of<Codes<B>> = B;

struct Packing {
    int64_t groups, group, octets;  // octets: bytes of a group's codes
    int64_t vectors, operands;  // in a group
    int64_t head_bytes;
    std::vector<int64_t> place;  // (head_dim,) the operand index of each element
    std::vector<uint32_t> words;
    std::vector<float> scales, minimums;  // (groups, STRIDE) for the tokens of a block, zero beyond them
    std::vector<float> weights;  // in the order of the scores
    static constexpr int64_t STRIDE = BLOCK_TOKENS + LANES;

    Packing(const Attention &job)
        : groups(job.head_dim / job.code_group), group(job.code_group), octets(group * job.bits / 8),
          vectors((octets + LANES - 1) / LANES), operands(vectors * 8 / job.bits), head_bytes(job.head_bytes),
          place(job.head_dim), words(STRIDE), scales(groups * STRIDE), minimums(groups * STRIDE),
          weights(BLOCK_TOKENS * MAX_HEADS + LANES) {
        for (int64_t i = 0; i < job.head_dim; ++i) {
            const int64_t octet = i % group % octets, part = i % group / octets;
            const int64_t n = octet / LANES, operand = i / group * operands + n * (8 / job.bits) + part;
            place[i] = operand * LANES + octet - first(n);
        }
    }

    int64_t width() const { return groups * operands * LANES; }
    // The offset of the n-th vector of a group. The last vector ends at the end of the group and may repeat bytes of
    // the previous one: the queries of these lanes are zero, and their sums are not used.
    int64_t first(int64_t n) const { return octets < LANES ? 0 : std::min(n * LANES, octets - LANES); }
};

INLINE Words load_codes(const uint8_t *from, const Packing &packing) {
    if (packing.octets >= LANES) return load_octets(from);
    uint8_t part[LANES] = {};
    memcpy(part, from, packing.octets);
    return load_octets(part);
}

template <int BITS>
INLINE Vec operand(Words codes, int part) {
    if (BITS == 8) return to_float(codes);
    return to_float(part ? codes >> 4 : codes & 15);
}

// A vector of scores belongs to LANES / HEADS tokens. Expand one number of each token, starting at `from`.
template <int HEADS>
INLINE Vec spread(const float *from) {
    if constexpr (HEADS == 1) return load(from);
    Words lanes = {};
    for (int i = 0; i < LANES; ++i) lanes[i] = (uint32_t)(i / HEADS);
    return permute(load(from), lanes);
}

INLINE void read_scales(const char *from, Packing &packing, int64_t tokens) {
    for (int64_t g = 0; g < packing.groups; ++g) {
        for (int64_t t = 0; t < tokens; ++t)
            packing.words[t] = raw<uint32_t>(from + t * packing.head_bytes + g * (int64_t)sizeof(uint32_t));
        std::fill_n(&packing.words[tokens], LANES, 0u);
        float *scales = &packing.scales[g * Packing::STRIDE], *minimums = &packing.minimums[g * Packing::STRIDE];
        for (int64_t t = 0; t < tokens; t += LANES) {
            const Words both = raw<Words>(&packing.words[t]);
            store(scales + t, from_half(__builtin_convertvector(both & 0xffff, Shorts)));
            store(minimums + t, from_half(__builtin_convertvector(both >> 16, Shorts)));
        }
    }
}

TARGET inline void begin_packed(Heads &heads, const Pass &pass) {
    const Packing &packing = *pass.packing;
    heads.operands.assign(MAX_HEADS * packing.width(), 0.0f);
    heads.query_sums.assign(LANES * packing.groups, 0.0f);
    heads.offsets.assign(MAX_HEADS * packing.groups, 0.0f);
    for (int h = 0; h < heads.count; ++h) {
        for (int64_t i = 0; i < pass.dim; ++i) {
            const float q = heads.q[h * pass.padded + i];
            heads.operands[h * packing.width() + packing.place[i]] = q;
            heads.query_sums[i / packing.group * LANES + h] += q;
        }
    }
    // In the order of a score vector: by token, then by head.
    const int each = heads.width();
    for (int64_t g = 0; g < packing.groups; ++g)
        for (int i = each; i < LANES; ++i)
            heads.query_sums[g * LANES + i] = heads.query_sums[g * LANES + i - each];
}

template <int BITS, int HEADS>
INLINE void score_packed(const char *k, Heads &heads, const Pass &pass) {
    constexpr int TOKENS = LANES / HEADS, PARTS = 8 / BITS;
    Packing &packing = *pass.packing;
    const int64_t width = packing.width(), bytes = packing.head_bytes;
    const char *codes = k + packing.groups * (int64_t)sizeof(uint32_t);
    read_scales(k, packing, pass.tokens);
    for (int64_t begin = 0; begin < pass.tokens; begin += TOKENS) {
        prefetch(pass.ahead, begin * bytes, std::min(begin + TOKENS, pass.tokens) * bytes);
        const uint8_t *from[TOKENS];  // memory beyond the last token must not be read
        for (int t = 0; t < TOKENS; ++t)
            from[t] = (const uint8_t *)codes + std::min(begin + t, pass.tokens - 1) * bytes;
        Vec total = {};
        for (int64_t g = 0; g < packing.groups; ++g) {
            const float *q = &heads.operands[g * packing.operands * LANES];
            Vec dots[LANES];
            for (Vec &dot : dots) dot = Vec{};
            for (int64_t n = 0; n < packing.vectors; ++n, q += PARTS * LANES) {
                const int64_t at = g * packing.octets + packing.first(n);
                for (int t = 0; t < TOKENS; ++t) {
                    const Words octets = load_codes(from[t] + at, packing);
                    for (int part = 0; part < PARTS; ++part) {
                        const Vec key = operand<BITS>(octets, part);
                        for (int h = 0; h < HEADS; ++h)
                            dots[t * HEADS + h] =
                                fma(key, load(q + h * width + part * LANES), dots[t * HEADS + h]);
                    }
                }
            }
            const Vec query_sums = load(&heads.query_sums[g * LANES]);
            const int64_t token = g * Packing::STRIDE + begin;
            total = fma(sums(dots), spread<HEADS>(&packing.scales[token]), total);
            total = fma(query_sums, spread<HEADS>(&packing.minimums[token]), total);
        }
        store(pass.scores + begin * HEADS, total * pass.scale);
    }
    for (int64_t i = pass.tokens * HEADS; i % LANES; ++i) pass.scores[i] = -INFINITY;
}

// Add WIDE operands of a group, starting at operand `at`. Its codes begin at `codes`, and its sum is `sum`.
template <int BITS, int HEADS, int WIDE>
INLINE void add_operands(const uint8_t *codes, float *sum, const Pass &pass, const float *shrink, int64_t at) {
    // The next block is prefetched in equal parts, one for each group.
    const char *ahead = at ? nullptr : pass.ahead;
    const int64_t share = pass.packing->head_bytes / pass.packing->groups;
    constexpr int PARTS = 8 / BITS, VECTORS = WIDE < PARTS ? 1 : WIDE / PARTS;
    const Packing &packing = *pass.packing;
    const int64_t width = packing.width();
    Vec sums[HEADS][WIDE];
    for (int h = 0; h < HEADS; ++h)
        for (int w = 0; w < WIDE; ++w) sums[h][w] = raw<Vec>(sum + h * width + (at + w) * LANES) * shrink[h];
    int64_t first[VECTORS];
    for (int n = 0; n < VECTORS; ++n) first[n] = packing.first(at / PARTS + n);
    for (int64_t t = 0; t < pass.tokens; ++t) {
        const uint8_t *from = codes + t * packing.head_bytes;
        prefetch(ahead, t * share, (t + 1) * share);
        for (int n = 0; n < VECTORS; ++n) {
            const Words octets = load_codes(from + first[n], packing);
            for (int part = 0; part < PARTS; ++part) {
                if (WIDE < PARTS && part != at % PARTS) continue;  // half a vector: the other half follows
                const Vec value = operand<BITS>(octets, part);
                for (int h = 0; h < HEADS; ++h) {
                    Vec &to = sums[h][WIDE < PARTS ? 0 : n * PARTS + part];
                    to = fma(value, splat(packing.weights[t * HEADS + h]), to);
                }
            }
        }
    }
    for (int h = 0; h < HEADS; ++h)
        for (int w = 0; w < WIDE; ++w) store(sum + h * width + (at + w) * LANES, sums[h][w]);
}

// Use as many operands at a time as fit in registers, then half as many, and so on.
template <int BITS, int HEADS, int WIDE>
TARGET inline void add_group(const uint8_t *codes, float *sum, const Pass &pass, const float *shrink, int64_t at) {
    for (; at + WIDE <= pass.packing->operands; at += WIDE)
        add_operands<BITS, HEADS, WIDE>(codes, sum, pass, shrink, at);
    if constexpr (WIDE > 1) add_group<BITS, HEADS, WIDE / 2>(codes, sum, pass, shrink, at);
}

template <int BITS, int HEADS>
INLINE void add_packed(const char *v, Heads &heads, Pass pass, const float *shrink) {
    Packing &packing = *pass.packing;
    const char *codes = v + packing.groups * (int64_t)sizeof(uint32_t);
    read_scales(v, packing, pass.tokens);
    for (int64_t g = 0; g < packing.groups; ++g) {
        Vec offset = {};
        for (int64_t i = 0; i < pass.tokens * HEADS; i += LANES) {
            const Vec p = raw<Vec>(pass.scores + i);
            const int64_t token = g * Packing::STRIDE + i / HEADS;
            store(&packing.weights[i], p * spread<HEADS>(&packing.scales[token]));
            offset = fma(p, spread<HEADS>(&packing.minimums[token]), offset);
        }
        float lanes[LANES], *offsets = &heads.offsets[g * MAX_HEADS];
        store(lanes, offset);
        for (int h = 0; h < HEADS; ++h) {
            offsets[h] *= shrink[h];
            for (int i = h; i < LANES; i += HEADS) offsets[h] += lanes[i];
        }
        constexpr int WIDE = SUM_REGISTERS / HEADS;
        float *sum = &heads.sum[g * packing.operands * LANES];
        add_group<BITS, HEADS, WIDE>((const uint8_t *)codes + g * packing.octets, sum, pass, shrink, 0);
        if (pass.ahead) pass.ahead += pass.tokens * (packing.head_bytes / packing.groups);
    }
}

// The sums of head h: (head_dim,), in element order.
inline const float *unpacked(Heads &heads, const Pass &pass, int h) {
    const Packing &packing = *pass.packing;
    heads.ordered.resize(pass.dim);
    for (int64_t i = 0; i < pass.dim; ++i)
        heads.ordered[i] = heads.sum[h * packing.width() + packing.place[i]] +
                           heads.offsets[i / packing.group * MAX_HEADS + h];
    return heads.ordered.data();
}

}  // namespace attention
}  // namespace VARIANT
