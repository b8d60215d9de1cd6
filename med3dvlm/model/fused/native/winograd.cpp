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
};

template <class T, class F>
void with_source(const T* x, const T* z, const float* scale, long n, F f) {
    if (z) f(Combined<T>{x, z, scale, n});
    else f(Plain<T>{x, n});
}

// Four neighbouring places along the axis: the `row`-th such group of all lines.
struct Group {
    long start, step, at, size;  // first place, distance of the next, its index in the line, the line's length

    Group(const Lines& lines, long row) : step(lines.inner), size(lines.size) {
        long groups = (size + OUT - 1) / OUT, inner = row % step, group = row / step % groups;
        at = OUT * group;
        start = (row / step / groups * size + at) * step + inner;
    }
    static long count(const Lines& lines) { return lines.outer * ((lines.size + OUT - 1) / OUT) * lines.inner; }
    bool holds(int j) const { return 0 <= at + j && at + j < size; }
    long place(int j) const { return start + j * step; }

    // What the source has at the j-th place, zeros where the line has ended.
    template <class S>
    lanes read(const S& source, int j, long c) const { return holds(j) ? source.read(place(j), c) : lanes{}; }
};

// v[p * step + c] = (B x)[p, c], x the six places of and around a group
template <class S>
void spread_inputs(const S& source, const Group& group, float* v, long step) {
    for (long c = 0; c < source.n; c += LANES) {
        lanes x[POINTS];
        #pragma GCC unroll 6
        for (int j = 0; j < POINTS; ++j) x[j] = group.read(source, j - 1, c);
        lanes even = x[4] - P2 * x[2], odd = Q * x[3] - P * x[1];
        lanes even2 = x[4] - Q2 * x[2], odd2 = P * x[3] - Q * x[1];
        store(v + c, x[0] - (P2 + Q2) * x[2] + x[4]);
        store(v + step + c, even2 + odd2);
        store(v + 2 * step + c, even2 - odd2);
        store(v + 3 * step + c, even + odd);
        store(v + 4 * step + c, even - odd);
        store(v + 5 * step + c, x[1] - (P2 + Q2) * x[3] + x[5]);
    }
}

// v[p * step + c] = (A d)[p, c], d the four places of a group
template <class S>
void spread_gradients(const S& source, const Group& group, float* v, long step) {
    for (long c = 0; c < source.n; c += LANES) {
        lanes d[OUT];
        #pragma GCC unroll 4
        for (int j = 0; j < OUT; ++j) d[j] = group.read(source, j, c);
        lanes even = d[0] + P2 * d[2], odd = P * (d[1] + P2 * d[3]);
        lanes even2 = d[0] + Q2 * d[2], odd2 = Q * (d[1] + Q2 * d[3]);
        store(v + c, d[0]);
        store(v + step + c, even + odd);
        store(v + 2 * step + c, even - odd);
        store(v + 3 * step + c, even2 + odd2);
        store(v + 4 * step + c, even2 - odd2);
        store(v + 5 * step + c, d[3]);
    }
}

// A group of y [.., n] (+)= A' u + bias; sums see the result, of which this may be the first group in a block.
template <class T>
void collect(const float* u, long step, const float* bias, const Group& group, T* y, bool add, Sums* sums, bool first,
             long n) {
    for (long c = 0; c < n; c += LANES) {
        lanes u1 = load(u + step + c), u2 = load(u + 2 * step + c), u3 = load(u + 3 * step + c);
        lanes u4 = load(u + 4 * step + c), even = u1 + u2, odd = P * (u1 - u2), even2 = u3 + u4, odd2 = Q * (u3 - u4);
        lanes results[OUT] = {load(u + c) + even + even2, odd + odd2, P2 * even + Q2 * even2,
                              P2 * odd + Q2 * odd2 + load(u + 5 * step + c)};
        #pragma GCC unroll 4
        for (int j = 0; j < OUT; ++j) {
            if (!group.holds(j)) break;
            T* to = y + group.place(j) * n + c;
            if (bias) results[j] += load(bias + c);
            if (sums) sums->see(c, results[j], first && j == 0);
            store(to, add ? load(to) + results[j] : results[j]);
        }
    }
}

template <class T, class S>
void convolve(const S& source, const Lines& lines, const float* weights, const float* bias, T* y, bool add,
              double* sums, long n_out, int threads) {
    long rows = Group::count(lines), n = source.n, wide = round_up(n, LANES);
    std::vector<Sums> seen(threads, Sums(n_out));
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> v(POINTS * BLOCK * wide), u(POINTS * BLOCK * n_out);
        Sums& ours = seen[omp_get_thread_num()];
        #pragma omp for schedule(static)
        for (long start = 0; start < rows; start += BLOCK) {
            long count = std::min<long>(BLOCK, rows - start);
            for (long m = 0; m < count; ++m)
                spread_inputs(source, Group(lines, start + m), &v[m * wide], BLOCK * wide);
            for (int p = 0; p < POINTS; ++p)
                product(&v[p * BLOCK * wide], wide, 1, weights + p * n * n_out, n_out, &u[p * BLOCK * n_out], n_out,
                        count, n_out, n, false);
            for (long m = 0; m < count; ++m)
                collect(&u[m * n_out], BLOCK * n_out, bias, Group(lines, start + m), y, add, sums ? &ours : nullptr,
                        m == 0, n_out);
            if (sums) ours.end_block();
        }
    }
    if (sums)
        for (const Sums& of_thread : seen) of_thread.add_to(sums);
}

template <class T, class S>
void kernel_gradient(const Plain<T>& x, const S& dy, const Lines& lines, float* result, int threads) {
    long rows = Group::count(lines), n = x.n, n_out = dy.n, wide = round_up(n, LANES), size = POINTS * n * n_out;
    std::vector<float> sums(size * threads);
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> v(POINTS * BLOCK * wide), z(POINTS * BLOCK * n_out);
        float* ours = &sums[size * omp_get_thread_num()];
        #pragma omp for schedule(static)
        for (long start = 0; start < rows; start += BLOCK) {
            long count = std::min<long>(BLOCK, rows - start);
            for (long m = 0; m < count; ++m) {
                Group group(lines, start + m);
                spread_inputs(x, group, &v[m * wide], BLOCK * wide);
                spread_gradients(dy, group, &z[m * n_out], BLOCK * n_out);
            }
            for (int p = 0; p < POINTS; ++p)
                product(&v[p * BLOCK * wide], 1, wide, &z[p * BLOCK * n_out], n_out, ours + p * n * n_out, n_out, n,
                        n_out, count, true);
        }
    }
    for (int thread = 0; thread < threads; ++thread)
        for (long i = 0; i < size; ++i) result[i] += sums[thread * size + i];
}

}  // namespace

extern "C" {

// y (+)= the convolution of x (or of the combination of x and z) along the lines. weights [6, n, n_out], bias [n_out]
// or null, sums [2, n_out] or null: the sums of the result and of its square are added to them.
void winograd_convolve(bool half, const void* x, const void* z, const float* scale, const float* weights,
                       const float* bias, void* y, bool add, double* sums, long outer, long size, long inner, long n,
                       long n_out, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        with_source((const T*)x, (const T*)z, scale, n, [&](auto source) {
            convolve(source, {outer, size, inner}, weights, bias, (T*)y, add, sums, n_out, threads);
        });
    });
}

// result [6, n, n_out] += the gradient of the weights, from the input x and the output's gradient dy (or its
// combination with z).
void winograd_kernel_gradient(bool half, const void* x, const void* dy, const void* z, const float* scale,
                              float* result, long outer, long size, long inner, long n, long n_out, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        with_source((const T*)dy, (const T*)z, scale, n_out, [&](auto source) {
            kernel_gradient(Plain<T>{(const T*)x, n}, source, {outer, size, inner}, result, threads);
        });
    });
}
}
