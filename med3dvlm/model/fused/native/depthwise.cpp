// Depth-wise convolutions along one axis, and the gradients of their kernels. Channels are a multiple of LANES.
#include "arithmetic.h"

namespace {

// LANES channels of one line, which may have gaps in memory: a copy without, as float32, zeros before and after. What
// the next line reads, `next` behind in memory, is called for: it is too scattered for the processor to see it coming.
template <int LENGTH>
struct Line {
    static constexpr int HALF = LENGTH / 2;
    std::vector<float> copy;

    explicit Line(long size) : copy((size + LENGTH - 1) * LANES) {}

    template <class T>
    void read(const T* x, long size, long step, long next) {
        for (long at = 0; at < size; ++at) {
            store(&copy[(at + HALF) * LANES], load(x + at * step));
            __builtin_prefetch(x + at * step + next);
        }
    }

    // scale[0] * x + scale[1] * z + scale[2], scale [3, n]
    template <class T>
    void read(const T* x, const T* z, const float* scale, long n, long size, long step, long next) {
        for (long at = 0; at < size; ++at) {
            lanes of_x = load(scale) * load(x + at * step), of_z = load(scale + n) * load(z + at * step);
            store(&copy[(at + HALF) * LANES], of_x + of_z + load(scale + 2 * n));
            __builtin_prefetch(x + at * step + next);
            __builtin_prefetch(z + at * step + next);
        }
    }
    lanes at(long i) const { return load(&copy[i * LANES]); }  // HALF before the place i
};

template <int LENGTH, class T>
void convolve(const T* x, const Lines& lines, const float* taps, T* y, double* sums, long n, int threads) {
    std::vector<Sums> seen(threads, Sums(n));
    #pragma omp parallel num_threads(threads)
    {
        Line<LENGTH> line(lines.size);
        Sums& ours = seen[omp_get_thread_num()];
        #pragma omp for schedule(static)
        for (long i = 0; i < lines.outer * lines.inner; ++i)
            for (long c = 0; c < n; c += LANES) {
                long start = lines.start(i) * n + c, step = lines.inner * n;
                long next = (lines.start(i + 1) - lines.start(i)) * n;
                line.read(x + start, lines.size, step, next);
                lanes tap[LENGTH], first{}, sum{}, square{};
                #pragma GCC unroll 16
                for (int t = 0; t < LENGTH; ++t) tap[t] = load(taps + t * n + c);
                for (long at = 0; at < lines.size; ++at) {
                    lanes result{};
                    #pragma GCC unroll 16
                    for (int t = 0; t < LENGTH; ++t) result += tap[t] * line.at(at + t);
                    T* to = y + start + at * step;
                    __builtin_prefetch(to + next, 1);
                    store(to, result);
                    if (at == 0) first = result;
                    result -= first;
                    sum += result;
                    square += result * result;
                }
                ours.add_block(c, first, sum, square, lines.size);
            }
    }
    for (const Sums& of_thread : seen) of_thread.add_to(sums);
}

// Both gradients in one pass, as they share what is read: dx by the taps `back`.
template <int LENGTH, class T>
void gradients(const T* x, const T* dy, const T* z, const float* scale, const float* back, const Lines& lines, T* dx,
               bool add, float* result, long n, int threads) {
    std::vector<float> all(threads * LENGTH * n);
    #pragma omp parallel num_threads(threads)
    {
        Line<LENGTH> of_x(lines.size), of_dy(lines.size);
        float* ours = &all[omp_get_thread_num() * LENGTH * n];
        #pragma omp for schedule(static)
        for (long i = 0; i < lines.outer * lines.inner; ++i)
            for (long c = 0; c < n; c += LANES) {
                long start = lines.start(i) * n + c, step = lines.inner * n;
                long next = (lines.start(i + 1) - lines.start(i)) * n;
                of_x.read(x + start, lines.size, step, next);
                of_dy.read(dy + start, z + start, scale + c, n, lines.size, step, next);
                lanes sums[LENGTH]{}, tap[LENGTH];
                for (long at = 0; at < lines.size; ++at)
                    #pragma GCC unroll 16
                    for (int t = 0; t < LENGTH; ++t) sums[t] += of_dy.at(at + LENGTH / 2) * of_x.at(at + t);
                #pragma GCC unroll 16
                for (int t = 0; t < LENGTH; ++t) {
                    float* to = ours + t * n + c;
                    store(to, load(to) + sums[t]);
                    tap[t] = load(back + t * n + c);
                }
                for (long at = 0; at < lines.size; ++at) {
                    lanes gradient{};
                    #pragma GCC unroll 16
                    for (int t = 0; t < LENGTH; ++t) gradient += tap[t] * of_dy.at(at + t);
                    T* to = dx + start + at * step;
                    __builtin_prefetch(to + next, 1);
                    store(to, add ? load(to) + gradient : gradient);
                }
            }
    }
    for (int thread = 0; thread < threads; ++thread)
        for (long i = 0; i < LENGTH * n; ++i) result[i] += all[thread * LENGTH * n + i];
}

// Calls f with a length as a constant: 3, 5, .. 13.
template <int LENGTH = 3, class F>
void with_length(long length, F f) {
    if constexpr (LENGTH < 13)
        if (length > LENGTH) return with_length<LENGTH + 2>(length, f);
    f(std::integral_constant<int, LENGTH>{});
}

}  // namespace

extern "C" {

// y = the convolution of x along the lines. taps [length, n], length 3, 5, .. 13. The sums of the result and of its
// square are added to sums [2, n].
void depthwise_convolve(bool half, const void* x, const float* taps, void* y, double* sums, long outer, long size,
                        long inner, long n, long length, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        with_length(length, [&](auto constant) {
            convolve<constant()>((const T*)x, {outer, size, inner}, taps, (T*)y, sums, n, threads);
        });
    });
}

// From the input x and scale[0] * dy + scale[1] * z + scale[2], the output's gradient: result [length, n] += the
// gradient of the taps, dx (+)= that of x by the taps back [length, n].
void depthwise_gradients(bool half, const void* x, const void* dy, const void* z, const float* scale, const float* back,
                         void* dx, bool add, float* result, long outer, long size, long inner, long n, long length,
                         long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        with_length(length, [&](auto constant) {
            gradients<constant()>((const T*)x, (const T*)dy, (const T*)z, scale, back, {outer, size, inner}, (T*)dx,
                                  add, result, n, threads);
        });
    });
}
}
