// Gradients of dense 3-tap convolutions along one axis, after Winograd: F(4, 3).
//
// Six neighbouring inputs become six values, each of which meets one matrix [C, C'], and four neighbouring outputs are
// combined from the six results: 6 products instead of 12. The gradient of a kernel is the same, read backwards.
// With V = B x, Z = A d, weights G k:    y = A' (G k . V),    d_kernel = G' (V Z').    B, A, G as in Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks" (2015), for the points 0, P, -P, Q, -Q and infinity: rounding
// errors are a third smaller than for their 1, -1, 2, -2.
#include "arithmetic.h"

namespace {

#define INLINE __attribute__((always_inline))  // else registers pass through memory

constexpr int POINTS = 6, OUT = 4;
constexpr float P = 2 / 3., Q = 3 / 2., P2 = P * P, Q2 = Q * Q;  // P * Q = 1

// A source gives LANES of the n channels of one place, zeros behind the last. What it holds may be one tensor,
template <class T>
struct Plain {
    const T* x;
    long n;
    lanes read(long place, long c) const { return load_some(x + place * n + c, n - c); }
    void fetch(long place) const { prefetch(x + place * n, n); }
};

// or scale[0] * x + scale[1] * z + scale[2] per channel, as the gradient of a batch norm is.
template <class T>
struct Combined {
    const T *x, *z;
    const float* scale;  // [3, n]
    long n;
    lanes read(long place, long c) const {
        return load(scale + c) * load(x + place * n + c) + load(scale + n + c) * load(z + place * n + c) +
               load(scale + 2 * n + c);
    }
    void fetch(long place) const {
        prefetch(x + place * n, n);
        prefetch(z + place * n, n);
    }
};

template <class T, class F>
void with_source(const T* x, const T* z, const float* scale, long n, F f) {
    if (z) f(Combined<T>{x, z, scale, n});
    else f(Plain<T>{x, n});
}

// Four neighbouring places along the axis: the `row`-th such group of all lines. Groups that follow each other lie side
// by side, those of BLOCK lines, and then along the axis: a block finds its neighbours where the one before left them.
struct Group {
    long start, step, at, size;  // first place, distance of the next, its index in the line, the line's length

    Group(const Lines& lines, long row) : step(lines.inner), size(lines.size) {
        long groups = (size + OUT - 1) / OUT, outer = row / (groups * step), rest = row % (groups * step);
        long first = rest / (groups * BLOCK) * BLOCK, side_by_side = std::min<long>(BLOCK, step - first);
        rest -= first * groups;
        at = OUT * (rest / side_by_side);
        start = (outer * size + at) * step + first + rest % side_by_side;
    }
    static long count(const Lines& lines) { return lines.outer * ((lines.size + OUT - 1) / OUT) * lines.inner; }
    bool holds(int j) const { return 0 <= at + j && at + j < size; }
    long place(int j) const { return start + j * step; }

    // Calls for what is read of the source, but for what the group before along the axis has called for.
    template <class S>
    void fetch(const S& source) const {
        for (int j = 1; j <= OUT && holds(j); ++j) source.fetch(place(j));
    }

    // Calls for what will be changed of y [.., n].
    template <class T>
    void fetch(T* y, long n) const {
        for (int j = 0; j < OUT && holds(j); ++j) prefetch(y + place(j) * n, n);
    }

    // Whether both neighbours and all four places exist: most groups have no border to look for.
    bool inside() const { return holds(-1) && holds(OUT); }
};

// Calls f with each COUNT groups of a block, and of LANES channels from c on with what the source has at the six places
// of and around each: zeros where the line or the block has ended.
template <int COUNT, class S, class F>
void each_places(const S& source, const Lines& lines, long start, long count, F f) {
    for (long m = 0; m < count; m += COUNT)
        with_constant<COUNT>(count - m, [&](auto there) {
            Group groups[] = {{lines, start + m}, {lines, start + m + there - 1}};  // one or two
            auto read = [&](auto inside) {
                for (long c = 0; c < source.n; c += LANES) {
                    lanes x[COUNT][POINTS]{};
                    #pragma GCC unroll 2
                    for (int i = 0; i < there; ++i)
                        #pragma GCC unroll 6
                        for (int j = 0; j < POINTS; ++j)
                            if (inside || groups[i].holds(j - 1)) x[i][j] = source.read(groups[i].place(j - 1), c);
                    f(m, c, x);
                }
            };
            if (groups[0].inside() && groups[1].inside()) read(std::true_type{});
            else read(std::false_type{});
        });
}

// v = B x, x the six places of and around a group
INLINE inline void spread_inputs(const lanes (&x)[POINTS], lanes (&v)[POINTS]) {
    lanes even = x[4] - P2 * x[2], odd = Q * x[3] - P * x[1];
    lanes even2 = x[4] - Q2 * x[2], odd2 = P * x[3] - Q * x[1];
    v[0] = x[0] - (P2 + Q2) * x[2] + x[4];
    v[1] = even2 + odd2, v[2] = even2 - odd2;
    v[3] = even + odd, v[4] = even - odd;
    v[5] = x[1] - (P2 + Q2) * x[3] + x[5];
}

// z = A d, d the four places of a group, after one before it
INLINE inline void spread_gradients(const lanes (&d)[POINTS], lanes (&z)[POINTS]) {
    lanes even = d[1] + P2 * d[3], odd = P * (d[2] + P2 * d[4]);
    lanes even2 = d[1] + Q2 * d[3], odd2 = Q * (d[2] + Q2 * d[4]);
    z[0] = d[1];
    z[1] = even + odd, z[2] = even - odd;
    z[3] = even2 + odd2, z[4] = even2 - odd2;
    z[5] = d[4];
}

// What a block of groups becomes: for each point a matrix [BLOCK, row] of factors.
template <class F>
struct Spread {
    long row;
    std::vector<F> values;

    explicit Spread(long row) : row(row), values(POINTS * BLOCK * row) {}
    F* at(int point, long m) { return &values[(point * BLOCK + m) * row]; }
};

// Values of all points of STEP rows, matrices `size` apart.
template <class F, int COUNT>
INLINE inline void store_steps(const lanes (&rows)[COUNT][POINTS], F* to, long size) {
    for (int p = 0; p < POINTS; ++p) {
        lanes step[COUNT];
        for (int s = 0; s < COUNT; ++s) step[s] = rows[s][p];
        store_step(to + p * size, step);
    }
}

// Calls f with each point and each TALL of m rows. Meanwhile g is called with 0, 1, .. BLOCK - 1.
template <class F, class G>
void each_tile(long m, F f, G g) {
    long tiles = (m + TALL - 1) / TALL, calls = (BLOCK + POINTS * tiles - 1) / (POINTS * tiles), next = 0;
    for (int point = 0; point < POINTS; ++point)
        for (long i = 0; i < m; i += TALL) {
            f(point, i, std::min<long>(TALL, m - i));
            for (long last = std::min<long>(next + calls, BLOCK); next < last; ++next) g(next);
        }
}

// A group of y [.., n] (+)= A' u.
template <class T>
void collect(const float* u, long step, const Group& group, T* y, bool add, long n) {
    bool inside = group.inside();
    for (long c = 0; c < n; c += LANES) {
        lanes u1 = load(u + step + c), u2 = load(u + 2 * step + c), u3 = load(u + 3 * step + c);
        lanes u4 = load(u + 4 * step + c), even = u1 + u2, odd = P * (u1 - u2), even2 = u3 + u4, odd2 = Q * (u3 - u4);
        lanes results[OUT] = {load(u + c) + even + even2, odd + odd2, P2 * even + Q2 * even2,
                              P2 * odd + Q2 * odd2 + load(u + 5 * step + c)};
        #pragma GCC unroll 4
        for (int j = 0; j < OUT; ++j) {
            if (!inside && !group.holds(j)) break;
            T* to = y + group.place(j) * n + c;
            store(to, add ? load(to) + results[j] : results[j]);
        }
    }
}

// Both gradients in one pass, as they share what is read: dx, unless null, by the weights `back` [6, n_out, n].
template <class T, class S>
void gradients(const Plain<T>& x, const S& dy, const Lines& lines, const float* back, T* dx, bool add, float* result,
               int threads) {
    using F = Factor<T>;
    long rows = Group::count(lines), n = x.n, n_out = dy.n, size = POINTS * n * n_out;
    std::vector<float> totals(size * threads);
    std::vector<F> weights(dx ? size : 0);  // steps of rows of `back`
    if (dx) put_steps(back, POINTS * n_out, n, weights.data());
    #pragma omp parallel num_threads(threads)
    {
        Spread<F> v(round_up(n, LANES)), z(n_out), of_dy(dx ? n_out : 0);
        Spread<float> u(dx ? n : 0);
        float* ours = &totals[size * omp_get_thread_num()];
        #pragma omp for schedule(static)
        for (long start = 0; start < rows; start += BLOCK) {
            long count = std::min<long>(BLOCK, rows - start);
            each_places<STEP<F>>(x, lines, start, count, [&](long m, long c, const auto& places) INLINE {
                lanes points[STEP<F>][POINTS];
                for (int s = 0; s < STEP<F>; ++s) spread_inputs(places[s], points[s]);
                store_steps(points, v.at(0, m) + c * STEP<F>, BLOCK * v.row);
            });
            each_places<STEP<F>>(dy, lines, start, count, [&](long m, long c, const auto& places) INLINE {
                lanes points[STEP<F>][POINTS];
                for (int s = 0; s < STEP<F>; ++s) spread_gradients(places[s], points[s]);
                store_steps(points, z.at(0, m) + c * STEP<F>, BLOCK * n_out);
                for (int s = 0; dx && s < STEP<F>; ++s) {
                    spread_inputs(places[s], points[s]);
                    for (int p = 0; p < POINTS; ++p) store(of_dy.at(p, m + s) + c, points[s][p]);
                }
            });
            each_tile(
                n,
                [&](int p, long i, long tall) {
                    product_over_rows(v.at(p, 0) + i * STEP<F>, v.row, z.at(p, 0), n_out, ours + (p * n + i) * n_out,
                                      n_out, tall, n_out, count, true);
                },
                [&](long m) {
                    if (start + BLOCK + m >= rows) return;
                    Group next(lines, start + BLOCK + m);
                    next.fetch(x);
                    next.fetch(dy);
                    if (dx) next.fetch(dx, n);
                });
            if (!dx) continue;
            for (int p = 0; p < POINTS; ++p)
                product(of_dy.at(p, 0), n_out, 1, &weights[p * n_out * n], n, u.at(p, 0), n, count, n, n_out, false);
            for (long m = 0; m < count; ++m)
                collect(u.at(0, m), BLOCK * n, Group(lines, start + m), dx, add, n);
        }
    }
    for (int thread = 0; thread < threads; ++thread)
        for (long i = 0; i < size; ++i) result[i] += totals[thread * size + i];
}

}  // namespace

extern "C" {

// From the input x and the output's gradient dy (or its combination with z): result [6, n, n_out] += the gradient of
// the weights, and unless null dx (+)= that of x by the weights back [6, n_out, n].
void winograd_gradients(bool half, const void* x, const void* dy, const void* z, const float* scale, const float* back,
                        void* dx, bool add, float* result, long outer, long size, long inner, long n, long n_out,
                        long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        with_source((const T*)dy, (const T*)z, scale, n_out, [&](auto source) {
            gradients(Plain<T>{(const T*)x, n}, source, {outer, size, inner}, back, (T*)dx, add, result, threads);
        });
    });
}
}
