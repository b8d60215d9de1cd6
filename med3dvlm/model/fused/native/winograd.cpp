// Dense 3-tap convolutions along one axis, and the gradients of their kernels, after Winograd: F(4, 3).
//
// Six neighbouring inputs become six values, each of which meets one matrix [C, C'], and four neighbouring outputs are
// combined from the six results: 6 products instead of 12. The gradient of a kernel is the same, read backwards.
// With V = B x, Z = A d, weights G k:    y = A' (G k . V),    d_kernel = G' (V Z').    B, A, G as in Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks" (2015), for the points 0, P, -P, Q, -Q and infinity: rounding
// errors are a third smaller than for their 1, -1, 2, -2.
#include "arithmetic.h"

namespace {

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

    // Calls f with whether both neighbours and all four places exist, as a constant: most have no border to look for.
    template <class F>
    void with_inside(F f) const {
        if (holds(-1) && holds(OUT)) f(std::true_type{});
        else f(std::false_type{});
    }

    // What the source has at the six places of and around the group, zeros where the line has ended.
    template <class S>
    void read(const S& source, long c, bool inside, lanes (&x)[POINTS]) const {
        #pragma GCC unroll 6
        for (int j = 0; j < POINTS; ++j) x[j] = inside || holds(j - 1) ? source.read(place(j - 1), c) : lanes{};
    }
};

// v[p * step] = (B x)[p], x the six places of and around a group
inline void spread_inputs(const lanes (&x)[POINTS], float* v, long step) {
    lanes even = x[4] - P2 * x[2], odd = Q * x[3] - P * x[1];
    lanes even2 = x[4] - Q2 * x[2], odd2 = P * x[3] - Q * x[1];
    store(v, x[0] - (P2 + Q2) * x[2] + x[4]);
    store(v + step, even2 + odd2);
    store(v + 2 * step, even2 - odd2);
    store(v + 3 * step, even + odd);
    store(v + 4 * step, even - odd);
    store(v + 5 * step, x[1] - (P2 + Q2) * x[3] + x[5]);
}

// z[p * step] = (A d)[p], d the four places of a group, after one before it
inline void spread_gradients(const lanes (&d)[POINTS], float* z, long step) {
    lanes even = d[1] + P2 * d[3], odd = P * (d[2] + P2 * d[4]);
    lanes even2 = d[1] + Q2 * d[3], odd2 = Q * (d[2] + Q2 * d[4]);
    store(z, d[1]);
    store(z + step, even + odd);
    store(z + 2 * step, even - odd);
    store(z + 3 * step, even2 + odd2);
    store(z + 4 * step, even2 - odd2);
    store(z + 5 * step, d[4]);
}

// As many matrices as there are points, `size` apart; what is at [i, j] of one is at[i * row + j * step].
template <class Float>
struct Matrices {
    Float* at;
    long size, row, step = 1;
};

// c (+)= a b, [m, n] = [m, k] [k, n], for each point. Meanwhile f is called with 0, 1, .. BLOCK - 1.
template <class A, class B, class F>
void products(Matrices<A> a, Matrices<B> b, Matrices<float> c, long m, long n, long k, bool add, F f) {
    long tiles = (m + TALL - 1) / TALL, calls = (BLOCK + POINTS * tiles - 1) / (POINTS * tiles), next = 0;
    for (int p = 0; p < POINTS; ++p)
        for (long i = 0; i < m; i += TALL) {
            product(a.at + p * a.size + i * a.row, a.row, a.step, b.at + p * b.size, b.row, c.at + p * c.size + i * c.row,
                    c.row, std::min<long>(TALL, m - i), n, k, add);
            for (long last = std::min<long>(next + calls, BLOCK); next < last; ++next) f(next);
        }
}

// A group of y [.., n] (+)= A' u + bias; sums see the result, of which this may be the first group in a block.
template <class T>
void collect(const float* u, long step, const float* bias, const Group& group, T* y, bool add, Sums* sums, bool first,
             long n) {
    group.with_inside([&](auto inside) {
        for (long c = 0; c < n; c += LANES) {
            lanes u1 = load(u + step + c), u2 = load(u + 2 * step + c), u3 = load(u + 3 * step + c);
            lanes u4 = load(u + 4 * step + c), even = u1 + u2, odd = P * (u1 - u2), even2 = u3 + u4;
            lanes odd2 = Q * (u3 - u4);
            lanes results[OUT] = {load(u + c) + even + even2, odd + odd2, P2 * even + Q2 * even2,
                                  P2 * odd + Q2 * odd2 + load(u + 5 * step + c)};
            #pragma GCC unroll 4
            for (int j = 0; j < OUT; ++j) {
                if (!inside && !group.holds(j)) break;
                T* to = y + group.place(j) * n + c;
                if (bias) results[j] += load(bias + c);
                if (sums) sums->see(c, results[j], first && j == 0);
                store(to, add ? load(to) + results[j] : results[j]);
            }
        }
    });
}

template <class T>
void convolve(const Plain<T>& x, const Lines& lines, const float* weights, const float* bias, T* y, bool add,
              double* sums, long n_out, int threads) {
    long rows = Group::count(lines), n = x.n, wide = round_up(n, LANES);
    std::vector<Sums> seen(threads, Sums(n_out));
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> v(POINTS * BLOCK * wide), u(POINTS * BLOCK * n_out);
        Sums& ours = seen[omp_get_thread_num()];
        #pragma omp for schedule(static)
        for (long start = 0; start < rows; start += BLOCK) {
            long count = std::min<long>(BLOCK, rows - start);
            for (long m = 0; m < count; ++m) {
                Group group(lines, start + m);
                group.with_inside([&](auto inside) {
                    for (long c = 0; c < n; c += LANES) {
                        lanes places[POINTS];
                        group.read(x, c, inside, places);
                        spread_inputs(places, &v[m * wide + c], BLOCK * wide);
                    }
                });
            }
            Matrices<float> of_v{v.data(), BLOCK * wide, wide}, of_u{u.data(), BLOCK * n_out, n_out};
            Matrices<const float> of_weights{weights, n * n_out, n_out};
            products(of_v, of_weights, of_u, count, n_out, n, false, [&](long m) {
                if (start + BLOCK + m >= rows) return;
                Group next(lines, start + BLOCK + m);
                next.fetch(x);
                next.fetch(y, n_out);
            });
            for (long m = 0; m < count; ++m)
                collect(&u[m * n_out], BLOCK * n_out, bias, Group(lines, start + m), y, add, sums ? &ours : nullptr,
                        m == 0, n_out);
            if (sums) ours.end_block();
        }
    }
    if (sums)
        for (const Sums& of_thread : seen) of_thread.add_to(sums);
}

// Both gradients in one pass, as they share what is read: dx, unless null, by the weights `back` [6, n_out, n].
template <class T, class S>
void gradients(const Plain<T>& x, const S& dy, const Lines& lines, const float* back, T* dx, bool add, float* result,
               int threads) {
    long rows = Group::count(lines), n = x.n, n_out = dy.n, wide = round_up(n, LANES), size = POINTS * n * n_out;
    std::vector<float> totals(size * threads);
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> v(POINTS * BLOCK * wide), z(POINTS * BLOCK * n_out);
        std::vector<float> of_dy(dx ? z.size() : 0), u(dx ? v.size() : 0);
        float* ours = &totals[size * omp_get_thread_num()];
        #pragma omp for schedule(static)
        for (long start = 0; start < rows; start += BLOCK) {
            long count = std::min<long>(BLOCK, rows - start);
            for (long m = 0; m < count; ++m) {
                Group group(lines, start + m);
                group.with_inside([&](auto inside) {
                    lanes places[POINTS];
                    for (long c = 0; c < n; c += LANES) {
                        group.read(x, c, inside, places);
                        spread_inputs(places, &v[m * wide + c], BLOCK * wide);
                    }
                    for (long c = 0; c < n_out; c += LANES) {
                        group.read(dy, c, inside, places);
                        spread_gradients(places, &z[m * n_out + c], BLOCK * n_out);
                        if (dx) spread_inputs(places, &of_dy[m * n_out + c], BLOCK * n_out);
                    }
                });
            }
            Matrices<float> of_v{v.data(), BLOCK * wide, 1, wide}, of_z{z.data(), BLOCK * n_out, n_out};
            Matrices<float> sums{ours, n * n_out, n_out};
            products(of_v, of_z, sums, n, n_out, count, true, [&](long m) {
                if (start + BLOCK + m >= rows) return;
                Group next(lines, start + BLOCK + m);
                next.fetch(x);
                next.fetch(dy);
                if (dx) next.fetch(dx, n);
            });
            if (!dx) continue;
            Matrices<float> of_back{of_dy.data(), BLOCK * n_out, n_out}, of_u{u.data(), BLOCK * n, n};
            Matrices<const float> weights{back, n_out * n, n};
            products(of_back, weights, of_u, count, n, n_out, false, [](long) {});
            for (long m = 0; m < count; ++m)
                collect(&u[m * n], BLOCK * n, nullptr, Group(lines, start + m), dx, add, nullptr, false, n);
        }
    }
    for (int thread = 0; thread < threads; ++thread)
        for (long i = 0; i < size; ++i) result[i] += totals[thread * size + i];
}

}  // namespace

extern "C" {

// y (+)= the convolution of x along the lines. weights [6, n, n_out], bias [n_out] or null, sums [2, n_out] or null: the
// sums of the result and of its square are added to them.
void winograd_convolve(bool half, const void* x, const float* weights, const float* bias, void* y, bool add,
                       double* sums, long outer, long size, long inner, long n, long n_out, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        convolve(Plain<T>{(const T*)x, n}, {outer, size, inner}, weights, bias, (T*)y, add, sums, n_out, threads);
    });
}

// From the input x and the output's gradient dy (or its combination with z): result [6, n, n_out] += the gradient of the
// weights, and unless null dx (+)= that of x by the weights back [6, n_out, n].
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
