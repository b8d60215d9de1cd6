// Dense 3-tap convolutions along one axis, and the gradients of their kernels, after Winograd: F(4, 3).
//
// Six neighbouring inputs become six values, each of which meets one matrix [C, C'], and four neighbouring outputs are
// combined from the six results: 6 products instead of 12. The gradient of a kernel is the same, read backwards.
// With V = B x, Z = A d, weights G k:    y = A' (G k . V),    d_kernel = G' (V Z').    B, A, G: Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks" (2015), points 0, 1, -1, 2, -2 and infinity.
#include "arithmetic.h"

namespace {

constexpr int POINTS = 6, OUT = 4;

// A source gives the channels of one place. What it holds may be one tensor,
template <class T>
struct Plain {
    const T* x;
    void read(long place, long n, float* to) const {
        #pragma omp simd
        for (long c = 0; c < n; ++c) to[c] = get(x[place * n + c]);
    }
};

// or scale[0] * x + scale[1] * z + scale[2] per channel, as the gradient of a batch norm is.
template <class T>
struct Combined {
    const T *x, *z;
    const float* scale;  // [3, n]
    void read(long place, long n, float* to) const {
        #pragma omp simd
        for (long c = 0; c < n; ++c)
            to[c] = scale[c] * get(x[place * n + c]) + scale[n + c] * get(z[place * n + c]) + scale[2 * n + c];
    }
};

template <class T, class F>
void with_source(const T* x, const T* z, const float* scale, F f) {
    if (z) f(Combined<T>{x, z, scale});
    else f(Plain<T>{x});
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

    // Places first .. last of the group, zeros where the line has ended: to[last - first, n].
    template <class S>
    void read(const S& source, int first, int last, long n, float* to) const {
        for (int j = first; j < last; ++j, to += n) {
            if (holds(j)) source.read(start + j * step, n, to);
            else std::fill_n(to, n, 0.f);
        }
    }
};

// v[p * step + c] = (B x)[p, c] for x[6, n]
void spread_inputs(const float* x, long n, float* v, long step) {
    #pragma omp simd
    for (long c = 0; c < n; ++c) {
        float x0 = x[c], x1 = x[n + c], x2 = x[2 * n + c], x3 = x[3 * n + c], x4 = x[4 * n + c], x5 = x[5 * n + c];
        float even = x4 - 4 * x2, odd = x3 - 4 * x1, even2 = x4 - x2, odd2 = 2 * (x3 - x1);
        v[c] = 4 * x0 - 5 * x2 + x4;
        v[step + c] = even + odd;
        v[2 * step + c] = even - odd;
        v[3 * step + c] = even2 + odd2;
        v[4 * step + c] = even2 - odd2;
        v[5 * step + c] = 4 * x1 - 5 * x3 + x5;
    }
}

// v[p * step + c] = (A d)[p, c] for d[4, n]
void spread_gradients(const float* d, long n, float* v, long step) {
    #pragma omp simd
    for (long c = 0; c < n; ++c) {
        float d0 = d[c], d1 = d[n + c], d2 = d[2 * n + c], d3 = d[3 * n + c];
        float even = d0 + d2, odd = d1 + d3, even2 = d0 + 4 * d2, odd2 = 2 * d1 + 8 * d3;
        v[c] = d0;
        v[step + c] = even + odd;
        v[2 * step + c] = even - odd;
        v[3 * step + c] = even2 + odd2;
        v[4 * step + c] = even2 - odd2;
        v[5 * step + c] = d3;
    }
}

// y[4, n] = A' u
void collect(const float* u, long step, long n, float* y) {
    #pragma omp simd
    for (long c = 0; c < n; ++c) {
        float u1 = u[step + c], u2 = u[2 * step + c], u3 = u[3 * step + c], u4 = u[4 * step + c];
        float even = u1 + u2, odd = u1 - u2, even2 = u3 + u4, odd2 = u3 - u4;
        y[c] = u[c] + even + even2;
        y[n + c] = odd + 2 * odd2;
        y[2 * n + c] = even + 4 * even2;
        y[3 * n + c] = odd + 8 * odd2 + u[5 * step + c];
    }
}

template <class T, class S>
void convolve(const S& source, const Lines& lines, const float* weights, const float* bias, T* y, bool add,
              double* sums, long n, long n_out, int threads) {
    long rows = Group::count(lines);
    std::vector<Sums> seen(threads, Sums(n_out));
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> v(POINTS * BLOCK * n), u(POINTS * BLOCK * n_out), few(POINTS * std::max(n, n_out));
        Sums& ours = seen[omp_get_thread_num()];
        #pragma omp for schedule(static)
        for (long start = 0; start < rows; start += BLOCK) {
            long count = std::min<long>(BLOCK, rows - start);
            for (long m = 0; m < count; ++m) {
                Group(lines, start + m).read(source, -1, 5, n, few.data());
                spread_inputs(few.data(), n, &v[m * n], BLOCK * n);
            }
            for (int p = 0; p < POINTS; ++p)
                product(&v[p * BLOCK * n], n, 1, weights + p * n * n_out, n_out, &u[p * BLOCK * n_out], n_out,
                        round_up(count, TALL), n_out, n, false);
            for (long m = 0; m < count; ++m) {
                Group group(lines, start + m);
                collect(&u[m * n_out], BLOCK * n_out, n_out, few.data());
                for (int j = 0; j < OUT && group.holds(j); ++j) {
                    float* row = &few[j * n_out];
                    if (bias)
                        for (long c = 0; c < n_out; ++c) row[c] += bias[c];
                    put_row(row, n_out, y + (group.start + j * group.step) * n_out, add);
                    if (sums) ours.see(row);
                }
            }
            if (sums) ours.end_block();
        }
    }
    if (sums)
        for (const Sums& of_thread : seen) of_thread.add_to(sums);
}

template <class T, class S>
void kernel_gradient(const Plain<T>& x, const S& dy, const Lines& lines, float* result, long n, long n_out,
                     int threads) {
    long rows = Group::count(lines), tall = round_up(n, TALL), size = POINTS * tall * n_out;
    std::vector<float> sums(size * threads);
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> v(POINTS * BLOCK * tall), z(POINTS * BLOCK * n_out), few(POINTS * std::max(n, n_out));
        float* ours = &sums[size * omp_get_thread_num()];
        #pragma omp for schedule(static)
        for (long start = 0; start < rows; start += BLOCK) {
            long count = std::min<long>(BLOCK, rows - start);
            for (long m = 0; m < count; ++m) {
                Group group(lines, start + m);
                group.read(x, -1, 5, n, few.data());
                spread_inputs(few.data(), n, &v[m * tall], BLOCK * tall);
                group.read(dy, 0, OUT, n_out, few.data());
                spread_gradients(few.data(), n_out, &z[m * n_out], BLOCK * n_out);
            }
            for (int p = 0; p < POINTS; ++p)
                product(&v[p * BLOCK * tall], 1, tall, &z[p * BLOCK * n_out], n_out, ours + p * tall * n_out, n_out,
                        tall, n_out, count, true);
        }
    }
    for (int thread = 0; thread < threads; ++thread)
        for (long row = 0; row < POINTS * n; ++row) {
            const float* from = &sums[thread * size + (row / n * tall + row % n) * n_out];
            for (long c = 0; c < n_out; ++c) result[row * n_out + c] += from[c];
        }
}

}  // namespace

extern "C" {

// y (+)= the convolution of x (or of the combination of x and z) along the lines. weights [6, n, n_out], bias [n_out] or
// null, sums [2, n_out] or null: the sums of the result and of its square are added to them.
void winograd_convolve(bool half, const void* x, const void* z, const float* scale, const float* weights,
                       const float* bias, void* y, bool add, double* sums, long outer, long size, long inner, long n,
                       long n_out, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        with_source((const T*)x, (const T*)z, scale, [&](auto source) {
            convolve(source, {outer, size, inner}, weights, bias, (T*)y, add, sums, n, n_out, threads);
        });
    });
}

// result [6, n, n_out] += the gradient of the weights, from the input x and the output's gradient dy (or its
// combination with z).
void winograd_kernel_gradient(bool half, const void* x, const void* dy, const void* z, const float* scale,
                              float* result, long outer, long size, long inner, long n, long n_out, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        with_source((const T*)dy, (const T*)z, scale, [&](auto source) {
            kernel_gradient(Plain<T>{(const T*)x}, source, {outer, size, inner}, result, n, n_out, threads);
        });
    });
}
}
