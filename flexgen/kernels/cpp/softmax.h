// From the scores of a block of tokens to their weights: caps, ALiBi, hidden tokens and the running softmax.
#pragma once

#include "blocks.h"

namespace VARIANT {
namespace attention {

// cap * tanh(score / cap)
INLINE Vec capped(Vec score, float cap) {
    const Vec e = exponential(larger(score, -score) * (-2.0f / cap));
    const Vec size = (1.0f - e) / (1.0f + e) * cap;
    return score < 0.0f ? -size : size;
}

// Cap the scores of a block and add the bias of ALiBi.
template <int HEADS>
APART void adjust(const Heads &heads, const Pass &pass) {
    const int64_t used = pass.tokens * HEADS;
    const Vec slopes = raw<Vec>(heads.slopes);
    Vec distance;
    for (int i = 0; i < LANES; ++i) distance[i] = (float)(pass.distance + i / HEADS + heads.later[i]);
    for (int64_t i = 0; i < used; i += LANES, distance += (float)(LANES / HEADS)) {
        Vec score = raw<Vec>(pass.scores + i);
        if (pass.cap != 0.0f) score = capped(score, pass.cap);
        store(pass.scores + i, fma(slopes, distance, score));
    }
    for (int64_t i = used; i % LANES; ++i) pass.scores[i] = -INFINITY;
}

// Set the scores of tokens that a query does not attend to.
template <int HEADS>
APART void hide(const Heads &heads, const Pass &pass) {
    const int64_t used = pass.tokens * HEADS;
    const Ints reach = raw<Ints>(heads.reach);
    Ints distance = raw<Ints>(heads.later);
    for (int i = 0; i < LANES; ++i) distance[i] += (int32_t)(pass.distance + i / HEADS);
    for (int64_t i = 0; i < used; i += LANES, distance += LANES / HEADS) {
        const Ints seen = (distance >= reach) & (distance <= 0);
        store(pass.scores + i, seen ? raw<Vec>(pass.scores + i) : splat(-INFINITY));
    }
}

// Convert scores to exponentials relative to the running maximum. `shrink`: the factor for older sums, by lane.
template <int HEADS>
INLINE void exponentials(Heads &heads, const Pass &pass, float (&shrink)[LANES]) {
    const int64_t used = pass.tokens * HEADS;
    const Vec before = raw<Vec>(heads.maximum);
    Vec maximum = before;
    for (int64_t i = 0; i < used; i += LANES) maximum = larger(raw<Vec>(pass.scores + i), maximum);
    for (int step = HEADS; step < LANES; step *= 2) {  // over the lanes of a head
        Words turned = {};
        for (int i = 0; i < LANES; ++i) turned[i] = (uint32_t)((i + step) % LANES);
        maximum = larger(permute(maximum, turned), maximum);
    }
    // A query may have attended to no token yet: -inf less -inf is no number.
    const Vec base = maximum == -INFINITY ? Vec{} : maximum;
    const Vec shrinks = exponential(before - base);
    Vec total = raw<Vec>(heads.total) * shrinks;
    for (int64_t i = 0; i < used; i += LANES) {
        const Vec e = exponential(raw<Vec>(pass.scores + i) - base);  // NaN for NaN, for any maximum
        store(pass.scores + i, e);
        total += e;
    }
    store(heads.maximum, maximum);
    store(heads.total, total);
    store(shrink, shrinks);
}

}  // namespace attention
}  // namespace VARIANT
