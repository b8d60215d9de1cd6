// Dense 3-tap convolutions along one axis as products of matrices, tap by tap, with the sums that a batch norm needs.
//
// They round as the plain code does: Winograd's errors (winograd.cpp) decide more near ties of a later max pooling the
// other way.
#include <cstdlib>

#include "arithmetic.h"

// y [places, n_out] = the convolution of x [places, n] along the lines, weights [3, n, n_out]; n_out a multiple of 16.
// The sums of the result and of its square are added to sums [2, n_out].
extern "C" void dense_convolve(bool, const float* x, const float* weights, float* y, double* sums, long outer,
                               long size, long inner, long n, long n_out, long threads) {
    // Places that follow each other and have the same neighbours: a line, or parts of what lies behind an axis.
    bool lines = inner == 1;
    long run = lines ? size : inner, length = lines ? size : std::min<long>(BLOCK, inner);
    long blocks = (run + length - 1) / length;
    std::vector<Sums> seen(threads, Sums(n_out));
    #pragma omp parallel num_threads(threads)
    {
        Sums& ours = seen[omp_get_thread_num()];
        #pragma omp for schedule(static)
        for (long i = 0; i < outer * size * inner / run * blocks; ++i) {
            long row = i / blocks, first = i % blocks * length, count = std::min(length, run - first);
            const float* from = x + (row * run + first) * n;
            float* to = y + (row * run + first) * n_out;
            for (long tap : {1, 0, 2}) {
                long away = tap - 1, at = row % size + away, skip = 0;  // places without a neighbour
                if (lines) skip = std::abs(away);
                else if (at < 0 || at >= size) continue;
                long start = away < 0 ? skip : 0;
                product(from + (start + away * inner) * n, n, 1, weights + tap * n * n_out, n_out, to + start * n_out,
                        n_out, count - skip, n_out, n, tap != 1);
            }
            for (long m = 0; m < count; ++m) ours.see(to + m * n_out);
            ours.end_block();
        }
    }
    for (const Sums& of_thread : seen) of_thread.add_to(sums);
}
