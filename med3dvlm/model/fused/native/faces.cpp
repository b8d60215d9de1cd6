// Sparse products for the outermost planes of a grid: `med3dvlm.model.fused.fourier.Face`.
#include "arithmetic.h"

namespace {

struct Face {
    long batch, rows, columns;                   // of places
    long from_batch, from_row, from_column;      // distances in the source
    long to_batch, to_row, to_column;            // and in the result
};

template <class T>
void add(const Face& face, const float* source, const long* offsets, const float* weights, T* y, long k, long n,
         int threads) {
    long places = face.batch * face.rows * face.columns;
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> seen(BLOCK * k), sums(BLOCK * n);
        std::vector<long> to(BLOCK);
        #pragma omp for schedule(static)
        for (long start = 0; start < places; start += BLOCK) {
            long count = std::min<long>(BLOCK, places - start);
            for (long m = 0; m < count; ++m) {
                long column = (start + m) % face.columns, row = (start + m) / face.columns % face.rows;
                long batch = (start + m) / face.columns / face.rows;
                const float* from = source + batch * face.from_batch + row * face.from_row + column * face.from_column;
                for (long i = 0; i < k; ++i) seen[m * k + i] = from[offsets[i]];
                to[m] = batch * face.to_batch + row * face.to_row + column * face.to_column;
            }
            product(seen.data(), k, 1, weights, n, sums.data(), n, round_up(count, TALL), n, k, false);
            for (long m = 0; m < count; ++m) put_row(&sums[m * n], n, y + to[m], true);
        }
    }
}

}  // namespace

extern "C" {

// y[place, n] += sum over i of source[place + offsets[i]] * weights[i, n] for the places of one plane.
void faces_add(bool half, const float* source, const long* offsets, const float* weights, void* y, long k, long n,
               long batch, long rows, long columns, long from_batch, long from_row, long from_column, long to_batch,
               long to_row, long to_column, long threads) {
    Face face{batch, rows, columns, from_batch, from_row, from_column, to_batch, to_row, to_column};
    with_storage(half, [&](auto storage) {
        add(face, source, offsets, weights, (decltype(storage)*)y, k, n, threads);
    });
}
}
