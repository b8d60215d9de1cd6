// Dense 3-tap convolutions along one axis as products of matrices, tap by tap, with the sums that a batch norm needs.
//
// They round as the plain code does: Winograd's errors (winograd.cpp) decide more near ties of a later max pooling the
// other way, and pairs of bfloat16 are multiplied twice as fast, which is what Winograd would save.
#include "arithmetic.h"

namespace {

// Places that follow each other and have the same neighbours: a line, or of what lies behind an axis at most BLOCK.
// Blocks follow each other along the axis: two of the three that one reads are still in the cache.
struct Blocks {
    Lines lines;
    bool whole = lines.inner == 1;  // lines
    long length = whole ? lines.size : std::min<long>(BLOCK, lines.inner);
    long side_by_side = whole ? 1 : (lines.inner + length - 1) / length;

    long count() const { return lines.outer * side_by_side * (whole ? 1 : lines.size); }
    long at(long i) const { return whole ? 0 : i % lines.size; }
    long first(long i) const {
        if (whole) return i * length;
        long part = i / lines.size % side_by_side, outer = i / lines.size / side_by_side;
        return (outer * lines.size + at(i)) * lines.inner + part * length;
    }
    long places(long i) const { return whole ? length : std::min(length, lines.inner - first(i) % lines.inner); }
};

template <class T>
void convolve(const T* x, const Factor<T>* weights, T* y, double* sums, const Blocks& blocks, long n, long n_out,
              int threads) {
    long size = blocks.lines.size, inner = blocks.lines.inner;
    std::vector<Sums> seen(threads, Sums(n_out));
    #pragma omp parallel num_threads(threads)
    {
        Sums& ours = seen[omp_get_thread_num()];
        std::vector<float> result(blocks.length * n_out);
        Buffer<Factor<T>> buffer;
        #pragma omp for schedule(static)
        for (long i = 0; i < blocks.count(); ++i) {
            long first = blocks.first(i), count = blocks.places(i);
            long next = std::min(i + 1, blocks.count() - 1);
            long coming = blocks.first(next), unread = blocks.whole || blocks.at(next) + 1 == size ? 0 : inner;
            for (long tap : {1, 0, 2}) {
                long away = tap - 1, from = 0, to = count;  // places with this neighbour
                if (blocks.whole) from += away < 0, to -= away > 0;
                else if (blocks.at(i) + away < 0 || blocks.at(i) + away >= size) continue;
                for (long m = from; m < to; m += TALL) {
                    long tall = std::min<long>(TALL, to - m);
                    const Factor<T>* rows = factors(x + (first + m + away * inner) * n, tall * n, buffer);
                    product(rows, n, 1, weights + tap * n * n_out, n_out, &result[m * n_out], n_out, tall, n_out, n,
                            tap != 1);
                    // With each tap a third of what the next block reads and writes is called for.
                    for (long ahead = m + tap * TALL / 3; ahead < std::min(m + (tap + 1) * TALL / 3, count); ++ahead) {
                        prefetch(x + (coming + unread + ahead) * n, n);
                        prefetch(y + (coming + ahead) * n_out, n_out);
                    }
                }
            }
            for (long c = 0; c < n_out; c += LANES) {
                lanes one = load(&result[c]), sum{}, square{};
                for (long m = 0; m < count; ++m) {
                    lanes value = load(&result[m * n_out + c]), difference = value - one;
                    store(y + (first + m) * n_out + c, value);
                    sum += difference;
                    square += difference * difference;
                }
                ours.add_block(c, one, sum, square, count);
            }
        }
    }
    for (const Sums& of_thread : seen) of_thread.add_to(sums);
}

}  // namespace

// y [places, n_out] = the convolution of x [places, n] along the lines; n_out a multiple of 16. Weights are
// [3, n, n_out] in float32, or where the processor multiplies bfloat16 in pairs, [3, n / 2, n_out] of pairs along n,
// which is then even. The sums of the result and of its square are added to sums [2, n_out].
extern "C" void dense_convolve(bool half, const void* x, const void* weights, void* y, double* sums, long outer,
                               long size, long inner, long n, long n_out, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        convolve((const T*)x, (const Factor<T>*)weights, (T*)y, sums, Blocks{{outer, size, inner}}, n, n_out, threads);
    });
}
