// Second moments of channels in float64, in which products of float32 numbers are exact: a variance that follows from
// them is a difference of nearly equal numbers.
#include "arithmetic.h"

namespace {

constexpr int NUMBERS = LANES / 2;  // in a register
constexpr int HIGH = 4, BROAD = 3;  // rows and registers of a tile; its sums fill the registers
constexpr long ROWS = 64;           // places that are worked on while they lie in the first-level cache

typedef double doubles __attribute__((vector_size(4 * LANES), aligned(8)));

template <class T>
void widen(const T* x, double* to, long count) {
    #pragma omp simd
    for (long c = 0; c < count; ++c) to[c] = get(x[c]);
}

// result[HEIGHT, WIDTH * NUMBERS] += a' b of a[count, HEIGHT] and b[count, WIDTH * NUMBERS], parts of rows n apart
template <int HEIGHT, int WIDTH>
void add_product(const double* a, const double* b, long count, long n, double* result, long row) {
    doubles sums[HEIGHT][WIDTH]{};
    for (long m = 0; m < count; ++m, a += n, b += n)
        #pragma GCC unroll 4
        for (int i = 0; i < HEIGHT; ++i)
            #pragma GCC unroll 4
            for (int j = 0; j < WIDTH; ++j) sums[i][j] += a[i] * *(const doubles*)(b + j * NUMBERS);
    for (int i = 0; i < HEIGHT; ++i)
        for (int j = 0; j < WIDTH; ++j) *(doubles*)(result + i * row + j * NUMBERS) += sums[i][j];
}

template <class T>
void second_moments(const T* a, const T* b, double* result, long places, long n, int threads) {
    long row = round_up(n, NUMBERS);
    std::vector<std::vector<double>> totals(threads, std::vector<double>(n * row));
    #pragma omp parallel num_threads(threads)
    {
        std::vector<double> left(ROWS * n), right(ROWS * n + row);  // registers reach beyond a row, and the last one
        double* total = totals[omp_get_thread_num()].data();
        #pragma omp for schedule(static)
        for (long start = 0; start < places; start += ROWS) {
            long count = std::min(ROWS, places - start);
            widen(a + start * n, left.data(), count * n);
            widen(b + start * n, right.data(), count * n);
            for (long i = 0; i < n; i += HIGH)
                with_constant<HIGH>(n - i, [&](auto height) {
                    for (long j = 0; j < row; j += BROAD * NUMBERS)
                        with_constant<BROAD>((row - j) / NUMBERS, [&](auto width) {
                            add_product<height(), width()>(&left[i], &right[j], count, n, total + i * row + j, row);
                        });
                });
        }
    }
    for (const auto& total : totals)
        for (long i = 0; i < n; ++i)
            for (long j = 0; j < n; ++j) result[i * n + j] += total[i * row + j];
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
