// Products of many rows of x in float32, by outer products. The lanes of a vector are rows of x, and each value of W is
// multiplied with all of them. A tile is some rows of W times one or two vectors of rows of x, with the sums in registers.
// They need no shuffles until the result is written.
//
// A depth is up to FLOAT_DEPTH values of each row; a band of W is multiplied one depth after the other (Goto and van de Geijn,
// "Anatomy of high-performance matrix multiplication", 2008). A depth of a band is widened or decoded to float32 once, and
// stays in the L2 cache. A panel of x stays in the L1 cache for all tiles of the band. tiles.h reads a row of W from the L2
// cache for every four rows of x, which takes longer than the arithmetic.
#pragma once

namespace VARIANT {
namespace linear {

constexpr int PANEL_VECTORS = 2;
constexpr int64_t FLOAT_DEPTH = 256, BAND_WEIGHTS = 24;  // values; the most rows of a band
// The rows of W of a tile. All of its sums, its vectors of x and a value of W are in 16 registers.
constexpr int panel_weights(int vectors) { return 12 / vectors; }

// The layout of x: for each depth, panels of up to PANEL_VECTORS vectors of rows. A panel has the first value of all its rows,
// then the second value, and so on. Groups of integers are in one depth.
struct Panels {
    int64_t depth, depths, vectors, count;  // count: of panels

    explicit Panels(const PackedLinear &job)
        : depth(job.bits == 16 ? FLOAT_DEPTH : std::max<int64_t>(FLOAT_DEPTH / job.group, 1) * job.group),
          depths((job.in + depth - 1) / depth), vectors((job.rows + LANES - 1) / LANES),
          count((vectors + PANEL_VECTORS - 1) / PANEL_VECTORS), in_(job.in) {}

    int64_t values(int64_t d) const { return std::min(depth, in_ - d * depth); }
    int64_t panel_vectors(int64_t panel) const { return std::min<int64_t>(PANEL_VECTORS, vectors - panel * PANEL_VECTORS); }
    // The index of the first value of a panel.
    int64_t place(int64_t d, int64_t panel) const {
        return (d * depth * vectors + panel * PANEL_VECTORS * values(d)) * LANES;
    }
    int64_t size() const { return in_ * vectors * LANES; }
    // From a row of a band to the next one. It is not a power of two, so that rows do not share cache sets.
    int64_t pitch() const { return whole(std::min(depth, in_), LINE / sizeof(float)) + LINE / sizeof(float); }

private:
    int64_t in_;
};

// Multiply `depth` values of a tile of rows of W with V vectors of rows of x. Add the products to `totals`
// (panel_weights(V), V * LANES), or set them.
template <int V>
APART void multiply_panel(const float *w, int64_t pitch, const float *x, int64_t depth, float *totals, bool add) {
    constexpr int WEIGHTS = panel_weights(V);
    Vec sum[WEIGHTS][V];
    UNROLLED
    for (int n = 0; n < WEIGHTS; ++n) {
        UNROLLED
        for (int v = 0; v < V; ++v) sum[n][v] = add ? load(totals + (n * V + v) * LANES) : Vec{};
    }
    // Counting would be an eighth of the instructions of a step, which takes time if another thread shares the core.
#pragma GCC unroll 4
    for (int64_t i = 0; i < depth; ++i, ++w, x += V * LANES) {
        Vec values[V];
        UNROLLED
        for (int v = 0; v < V; ++v) values[v] = load(x + v * LANES);
        UNROLLED
        for (int n = 0; n < WEIGHTS; ++n) {
            const Vec weight = splat(w[n * pitch]);
            UNROLLED
            for (int v = 0; v < V; ++v) sum[n][v] = fma(weight, values[v], sum[n][v]);
        }
    }
    UNROLLED
    for (int n = 0; n < WEIGHTS; ++n) {
        UNROLLED
        for (int v = 0; v < V; ++v) store(totals + (n * V + v) * LANES, sum[n][v]);
    }
}

// The part of W that is multiplied next, to prefetch while other parts are multiplied.
class NextWeights {
public:
    NextWeights(const PackedLinear &job, int64_t n, int64_t at, int64_t values, int64_t rows)
        : row_bytes_(job.in * job.bits / 8), from_(job.packed + n * row_bytes_ + at * job.bits / 8),
          lines_((values * job.bits / 8 + LINE - 1) / LINE), rows_(std::min(rows, job.out - n)) {}

    // Prefetch share `part` of `parts`.
    void prefetch(int64_t part, int64_t parts) const {
        const int64_t all = rows_ * lines_, end = all * (part + 1) / parts;
        for (int64_t i = all * part / parts; i < end; ++i)
            __builtin_prefetch(from_ + i / lines_ * row_bytes_ + i % lines_ * LINE, 0, 2);
    }

private:
    int64_t row_bytes_;
    const uint8_t *from_;
    int64_t lines_, rows_;
};

// Write the totals (count, vectors * LANES) of rows of x from row `m` with `count` rows of W from row `n`.
template <class T>
TARGET void write_panel(const PackedLinear &job, const float *totals, int64_t vectors, int64_t m, int64_t n, int64_t count) {
    float bias[BAND_WEIGHTS + LANES] = {};
    if (job.bias) widen((const T *)job.bias + n, bias, count);
    for (int64_t v = 0; v < vectors; ++v, m += LANES) {
        const int64_t rows = std::min<int64_t>(LANES, job.rows - m);
        for (int64_t at = 0; at < count; at += LANES) {
            Vec columns[LANES];
            transpose(totals + (at * vectors + v) * LANES, vectors * LANES, columns);
            T *to = (T *)job.y + m * job.out + n + at;
            for (int64_t k = 0; k < rows; ++k, to += job.out) {
                const Vec values = columns[k] + load(bias + at);
                if (at + LANES <= count) store(to, values);
                else store_part(to, values, count - at);
            }
        }
    }
}

TARGET inline void write_panel(const PackedLinear &job, const float *totals, int64_t vectors, int64_t m, int64_t n,
                               int64_t count) {
    if (job.type == Type::float32) return write_panel<float>(job, totals, vectors, m, n, count);
    if (job.type == Type::bfloat16) return write_panel<Bf16>(job, totals, vectors, m, n, count);
    write_panel<Half>(job, totals, vectors, m, n, count);
}

// Multiply rows `begin` to `end` of W with all rows of x.
TARGET inline void multiply_by_outer(const PackedLinear &job, int64_t begin, int64_t end) {
    const Panels panels(job);
    const int64_t pitch = panels.pitch(), band_values = BAND_WEIGHTS * pitch;
    static thread_local std::vector<float> room;
    float *band = aligned(room, band_values + panels.vectors * LANES * BAND_WEIGHTS);
    for (int64_t n = begin; n < end; n += BAND_WEIGHTS) {
        const int64_t rows = std::min(BAND_WEIGHTS, end - n);
        for (int64_t d = 0; d < panels.depths; ++d) {
            const int64_t at = d * panels.depth, depth = panels.values(d);
            const bool last = d + 1 == panels.depths;
            for (int64_t k = 0; k < rows; ++k) fill(job, n + k, at, depth, band + k * pitch);
            // After the last depth, the next band of the thread often follows.
            const NextWeights next(job, last ? n + rows : n, last ? 0 : at + depth, panels.values(last ? 0 : d + 1),
                                   last ? BAND_WEIGHTS : rows);
            for (int64_t panel = 0; panel < panels.count; ++panel) {
                const int64_t vectors = panels.panel_vectors(panel), weights = panel_weights(vectors);
                const int64_t tiles = (rows + weights - 1) / weights;
                const float *x = (const float *)job.operand + panels.place(d, panel);
                float *totals = band + band_values + panel * PANEL_VECTORS * LANES * BAND_WEIGHTS;
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const float *w = band + tile * weights * pitch;
                    float *to = totals + tile * weights * vectors * LANES;
                    next.prefetch(panel * tiles + tile, panels.count * tiles);
                    if (vectors == 1) multiply_panel<1>(w, pitch, x, depth, to, d > 0);
                    else multiply_panel<2>(w, pitch, x, depth, to, d > 0);
                }
                if (last) write_panel(job, totals, vectors, panel * PANEL_VECTORS * LANES, n, rows);
            }
        }
    }
}

inline void prepare_outer(PackedLinear &job) {
    const Panels panels(job);
    job.tiled = true;
    job.block = panel_weights(1);
    job.piece = 4 * BAND_WEIGHTS;
    job.operand = aligned(job.wide, panels.size());
    job.parts = panels.vectors;
}

// Fill the layout of x for some vectors of rows.
template <class T>
TARGET void order_outer(const PackedLinear &job, int64_t first, int64_t last) {
    const Panels panels(job);
    for (int64_t vector = first; vector < last; ++vector) {
        const int64_t panel = vector / PANEL_VECTORS, step = panels.panel_vectors(panel) * LANES;
        const int64_t m = vector * LANES, rows = std::min<int64_t>(LANES, job.rows - m);
        float values[LANES * LANES] = {};
        for (int64_t d = 0; d < panels.depths; ++d) {
            float *to = (float *)job.operand + panels.place(d, panel) + vector % PANEL_VECTORS * LANES;
            for (int64_t i = 0; i < panels.values(d); i += LANES) {
                const int64_t count = std::min<int64_t>(LANES, panels.values(d) - i);
                for (int64_t k = 0; k < rows; ++k) {
                    const T *from = (const T *)job.x + (m + k) * job.in + d * panels.depth + i;
                    store(values + k * LANES, count == LANES ? load(from) : load_part(from, count));
                }
                Vec columns[LANES];
                transpose(values, LANES, columns);
                for (int64_t k = 0; k < count; ++k, to += step) store(to, columns[k]);
            }
        }
    }
}

TARGET inline void order_outer(const PackedLinear &job, int64_t first, int64_t last) {
    if (job.type == Type::float32) return order_outer<float>(job, first, last);
    if (job.type == Type::bfloat16) return order_outer<Bf16>(job, first, last);
    order_outer<Half>(job, first, last);
}

}  // namespace linear
}  // namespace VARIANT
