// Second moments of channels, as exact as in float64 arithmetic: products of a block are float32 and taken about the
// block's first places, sums of blocks are float64.
#include "arithmetic.h"

namespace {

// to[count, wide] = x[count, n] - first[n]; returns through `sum` [n] the sums of the differences.
template <class T>
void centre(const T* x, long count, long n, long wide, float* first, float* to, float* sum) {
    for (long c = 0; c < n; ++c) first[c] = get(x[c]), sum[c] = 0;
    for (long m = 0; m < count; ++m) {
        const T* from = x + m * n;
        float* row = to + m * wide;
        #pragma omp simd
        for (long c = 0; c < n; ++c) {
            row[c] = get(from[c]) - first[c];
            sum[c] += row[c];
        }
    }
}

template <class T>
void second_moments(const T* a, const T* b, double* result, long places, long n, int threads) {
    long tall = round_up(n, TALL), wide = round_up(n, 16);
    std::vector<std::vector<double>> totals(threads, std::vector<double>(n * n));
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> left(BLOCK * tall), right(BLOCK * wide), sums(tall * wide), first(2 * n), differences(2 * n);
        double* total = totals[omp_get_thread_num()].data();
        #pragma omp for schedule(static)
        for (long start = 0; start < places; start += BLOCK) {
            long count = std::min<long>(BLOCK, places - start);
            float *first_b = &first[n], *sum_a = differences.data(), *sum_b = &differences[n];
            centre(a + start * n, count, n, tall, first.data(), left.data(), sum_a);
            centre(b + start * n, count, n, wide, first_b, right.data(), sum_b);
            product(left.data(), 1, tall, right.data(), wide, sums.data(), wide, tall, wide, count, false);
            for (long i = 0; i < n; ++i)
                for (long j = 0; j < n; ++j)
                    total[i * n + j] += sums[i * wide + j] + double(first[i]) * sum_b[j] +
                                        (sum_a[i] + double(count) * first[i]) * first_b[j];
        }
    }
    for (const auto& total : totals)
        for (long i = 0; i < n * n; ++i) result[i] += total[i];
}

}  // namespace

// result [n, n] += a' b for a, b [places, n]
extern "C" void moments_second(bool half, const void* a, const void* b, double* result, long places, long n,
                               long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        second_moments((const T*)a, (const T*)b, result, places, n, threads);
    });
}
