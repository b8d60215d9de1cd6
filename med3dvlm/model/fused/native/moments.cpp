// Second moments of channels, as exact as in float64 arithmetic: products of a block are float32 and taken about the
// block's first places, sums of blocks are float64.
#include "arithmetic.h"

namespace {

constexpr long ROWS = 4;  // that are taken together: n is no multiple of LANES

// Places of one block as differences from its first, [count, n], and their sums.
struct Block {
    long n;
    std::vector<float> first = std::vector<float>(ROWS * n), sum = first, rows;

    explicit Block(long n) : n(n), rows(BLOCK * n + 16) {}  // `product` reads beyond the last

    template <class T>
    void read(const T* x, long count) {
        for (long c = 0; c < n; ++c) first[c] = get(x[c]);
        for (long m = 1; m < ROWS; ++m) std::copy_n(first.data(), n, &first[m * n]);
        std::fill(sum.begin(), sum.end(), 0.f);
        for (long m = 0; m < count; m += ROWS) {
            const T* from = x + m * n;
            float* to = &rows[m * n];
            #pragma omp simd
            for (long c = 0; c < std::min(ROWS, count - m) * n; ++c) {
                to[c] = get(from[c]) - first[c];
                sum[c] += to[c];
            }
        }
        for (long m = 1; m < ROWS; ++m)
            for (long c = 0; c < n; ++c) sum[c] += sum[m * n + c];
    }
};

template <class T>
void second_moments(const T* a, const T* b, double* result, long places, long n, int threads) {
    long tall = round_up(n, TALL), wide = round_up(n, 16);
    std::vector<std::vector<double>> totals(threads, std::vector<double>(n * n));
    #pragma omp parallel num_threads(threads)
    {
        Block left(n), right(n);
        std::vector<float> sums(tall * wide);
        double* total = totals[omp_get_thread_num()].data();
        #pragma omp for schedule(static)
        for (long start = 0; start < places; start += BLOCK) {
            long count = std::min<long>(BLOCK, places - start);
            left.read(a + start * n, count);
            right.read(b + start * n, count);
            product(left.rows.data(), 1, n, right.rows.data(), n, sums.data(), wide, tall, wide, count, false);
            for (long i = 0; i < n; ++i)
                for (long j = 0; j < n; ++j)
                    total[i * n + j] += sums[i * wide + j] + double(left.first[i]) * right.sum[j] +
                                        (left.sum[i] + double(count) * left.first[i]) * right.first[j];
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
