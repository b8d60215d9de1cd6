// Three batch norms and their sum, point by point: each tensor is read once. Channels are a multiple of LANES.
#include "arithmetic.h"

namespace {

constexpr long ROWS = 64;  // over which float32 sums run

template <class T>
void normalised_sum(const T* const z[3], const float* scale, const float* shift, T* y, long places, long n,
                    int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long place = 0; place < places; ++place) {
        const T *h = z[0] + place * n, *w = z[1] + place * n, *d = z[2] + place * n;
        for (long c = 0; c < n; c += LANES) {
            lanes sum = load(shift + c) + load(scale + c) * load(h + c);
            sum += load(scale + n + c) * load(w + c);
            store(y + place * n + c, sum + load(scale + 2 * n + c) * load(d + c));
        }
    }
}

template <class T>
void gradient_sums(const T* dy, const T* const z[3], const float* mean, double* sums, long places, long n,
                   int threads) {
    std::vector<std::vector<double>> totals(threads, std::vector<double>(4 * n));
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> part(4 * n);
        std::vector<double>& total = totals[omp_get_thread_num()];
        #pragma omp for schedule(static)
        for (long start = 0; start < places; start += ROWS) {
            std::fill(part.begin(), part.end(), 0.f);
            float* sum = part.data();
            for (long at = start * n; at < std::min(start + ROWS, places) * n; at += n) {
                const T *d = dy + at, *z0 = z[0] + at, *z1 = z[1] + at, *z2 = z[2] + at;
                #pragma omp simd
                for (long c = 0; c < n; ++c) {
                    float gradient = get(d[c]);
                    sum[c] += gradient;
                    sum[n + c] += gradient * (get(z0[c]) - mean[c]);
                    sum[2 * n + c] += gradient * (get(z1[c]) - mean[n + c]);
                    sum[3 * n + c] += gradient * (get(z2[c]) - mean[2 * n + c]);
                }
            }
            for (long c = 0; c < 4 * n; ++c) total[c] += part[c];
        }
    }
    for (const auto& total : totals)
        for (long c = 0; c < 4 * n; ++c) sums[c] += total[c];
}

}  // namespace

extern "C" {

// y = scale[0] * h + scale[1] * w + scale[2] * d + shift, tensors [places, n], scale [3, n], shift [n]
void norms_sum(bool half, const void* h, const void* w, const void* d, const float* scale, const float* shift, void* y,
               long places, long n, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        const T* z[3] = {(const T*)h, (const T*)w, (const T*)d};
        normalised_sum(z, scale, shift, (T*)y, places, n, threads);
    });
}

// sums [4, n] += dy, and dy * (z - mean) for z in h, w, d, summed over places; mean [3, n]
void norms_gradient_sums(bool half, const void* dy, const void* h, const void* w, const void* d, const float* mean,
                         double* sums, long places, long n, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        const T* z[3] = {(const T*)h, (const T*)w, (const T*)d};
        gradient_sums((const T*)dy, z, mean, sums, places, n, threads);
    });
}
}
