// Depth-wise convolutions along one axis, and the gradients of their kernels. Channels are a multiple of LANES.
#include "arithmetic.h"

namespace {

template <class T>
void convolve(const T* x, const Lines& lines, const float* taps, const float* bias, T* y, bool add, double* sums,
              long n, long length, int threads) {
    std::vector<Sums> seen(threads, Sums(n));
    long half = length / 2;
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> row(n);
        Sums& ours = seen[omp_get_thread_num()];
        #pragma omp for schedule(static)
        for (long start = 0; start < lines.places(); start += BLOCK) {
            for (long place = start; place < std::min(start + BLOCK, lines.places()); ++place) {
                long at = place / lines.inner % lines.size;
                long first = std::max(0L, half - at), last = std::min(length, lines.size - at + half);
                const T* from = x + (place - half * lines.inner) * n;
                for (long c = 0; c < n; c += LANES) {
                    lanes sum = bias ? load(bias + c) : lanes{};
                    for (long t = first; t < last; ++t)
                        sum += load(taps + t * n + c) * load(from + t * lines.inner * n + c);
                    *(lanes*)&row[c] = sum;
                }
                put_row(row.data(), n, y + place * n, add);
                if (sums) ours.see(row.data());
            }
            if (sums) ours.end_block();
        }
    }
    if (sums)
        for (const Sums& of_thread : seen) of_thread.add_to(sums);
}

template <int LENGTH, class T>
void kernel_gradient(const T* x, const T* dy, const Lines& lines, float* result, long n, int threads) {
    constexpr int HALF = LENGTH / 2;
    std::vector<float> all(threads * LENGTH * n);
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> line((lines.size + LENGTH - 1) * LANES);  // zeros before and after
        float* ours = &all[omp_get_thread_num() * LENGTH * n];
        #pragma omp for schedule(static)
        for (long i = 0; i < lines.outer * lines.inner; ++i) {
            long start = (i / lines.inner * lines.size * lines.inner + i % lines.inner) * n, step = lines.inner * n;
            for (long c = 0; c < n; c += LANES) {
                for (long at = 0; at < lines.size; ++at)
                    *(lanes*)&line[(at + HALF) * LANES] = load(x + start + at * step + c);
                lanes sums[LENGTH];
                #pragma GCC unroll 16
                for (int t = 0; t < LENGTH; ++t) sums[t] = load(ours + t * n + c);
                for (long at = 0; at < lines.size; ++at) {
                    lanes gradient = load(dy + start + at * step + c);
                    #pragma GCC unroll 16
                    for (int t = 0; t < LENGTH; ++t) sums[t] += gradient * load(&line[(at + t) * LANES]);
                }
                #pragma GCC unroll 16
                for (int t = 0; t < LENGTH; ++t) *(lanes*)(ours + t * n + c) = sums[t];
            }
        }
    }
    for (int thread = 0; thread < threads; ++thread)
        for (long i = 0; i < LENGTH * n; ++i) result[i] += all[thread * LENGTH * n + i];
}

}  // namespace

extern "C" {

// y (+)= the convolution of x along the lines. taps [length, n], length odd; bias [n] or null; sums [2, n] or null: the
// sums of the result and of its square are added to them.
void depthwise_convolve(bool half, const void* x, const float* taps, const float* bias, void* y, bool add,
                        double* sums, long outer, long size, long inner, long n, long length, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        convolve((const T*)x, {outer, size, inner}, taps, bias, (T*)y, add, sums, n, length, threads);
    });
}

// result [length, n] += the gradient of the taps, from the input and the gradient of the output; length 3, 5, .. 13
void depthwise_kernel_gradient(bool half, const void* x, const void* dy, float* result, long outer, long size,
                               long inner, long n, long length, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        auto run = [&](auto constant) {
            kernel_gradient<constant()>((const T*)x, (const T*)dy, {outer, size, inner}, result, n, threads);
        };
        switch (length) {
            case 3: run(std::integral_constant<int, 3>{}); break;
            case 5: run(std::integral_constant<int, 5>{}); break;
            case 7: run(std::integral_constant<int, 7>{}); break;
            case 9: run(std::integral_constant<int, 9>{}); break;
            case 11: run(std::integral_constant<int, 11>{}); break;
            case 13: run(std::integral_constant<int, 13>{}); break;
        }
    });
}
}
