// The largest value of each row, for one variant.

namespace VARIANT {
namespace largest {

template <class T>
TARGET int64_t index_in(const T *x, int64_t count) {
    // For each lane, its largest value so far, the index of the first one, and whether no value is NaN.
    Vec most = splat(-INFINITY);
    Words at = {}, place;
    for (int lane = 0; lane < LANES; ++lane) place[lane] = (uint32_t)lane;
    const Words first = place;
    Ints valid = most == most;
    const int64_t body = count / LANES * LANES, rest = count - body;
    for (int64_t i = 0; i < body; i += LANES) {
        const Vec values = load(x + i);
        at = values > most ? place : at;
        most = larger(values, most);
        valid &= values == values;
        place += (uint32_t)LANES;
    }
    if (rest) {
        const Vec values = first < (uint32_t)rest ? load_part(x + body, rest) : splat(-INFINITY);
        at = values > most ? place : at;
        most = larger(values, most);
        valid &= values == values;
    }
    int64_t index = at[0];
    float value = most[0];
    for (int lane = 0; lane < LANES; ++lane) {
        if (!valid[lane]) return NO_INDEX;
        if (most[lane] < value || (most[lane] == value && at[lane] >= index)) continue;
        value = most[lane];
        index = at[lane];
    }
    return index;
}

template <class T>
TARGET void find(const Largest &job, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
        job.indices[row] = index_in((const T *)job.x + row * job.stride, job.size);
}

void find_any(const Largest &job, int64_t begin, int64_t end) {
    if (job.type == Type::float32) return find<float>(job, begin, end);
    if (job.type == Type::bfloat16) return find<Bf16>(job, begin, end);
    find<Half>(job, begin, end);
}

}  // namespace largest
}  // namespace VARIANT
