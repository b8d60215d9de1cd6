// The feed-forward part of a block: expansion, GELU, contraction. Inner values exist in the cache only, but for those
// that the backward pass needs.
#include "feed_forward.h"

namespace {

constexpr long CHUNK = 4 * PANEL;  // inner channels that are worked on together

// A matrix [k, n] of factors in panels of 64 columns, each [k, 64].
template <class F>
struct Panels {
    const F* at;
    long k;
    const F* from(long row, long column) const { return at + (column / PANEL * k + row) * PANEL; }
};

// weight[n, k] as Panels of its transpose, zeros in columns behind the last.
template <class F>
void pack(const float* weight, F* to, long n, long k, int threads) {
    #pragma omp parallel for collapse(2) num_threads(threads)
    for (long p = 0; p < n; p += PANEL)
        for (long t = 0; t < k; t += PANEL) {
            long rows = std::min(PANEL, n - p), columns = std::min(PANEL, k - t);
            F block[PANEL][PANEL]{};
            for (long i = 0; i < rows; ++i)
                for (long c = 0; c < columns; c += LANES) store(block[i] + c, load(weight + (p + i) * k + t + c));
            for (long c = 0; c < columns; c += STEP<F>)
                for (long i = 0; i < PANEL; ++i)
                    for (int s = 0; s < STEP<F>; ++s) to[p * k + (t + c) * PANEL + i * STEP<F> + s] = block[i][c + s];
        }
}

// active[rows, CHUNK] = GELU(hidden[rows, PANEL] + bias) in n columns; its argument is kept [rows, wide] unless null.
template <class F, class T>
void activate(const float* hidden, const float* bias, long rows, long n, F* active, T* kept, long wide) {
    for (long m = 0; m < rows; m += FEW)
        with_constant<FEW>(rows - m, [&](auto few) {
            for (long c = 0; c < n; c += LANES) {
                lanes value[few], share[few];
                for (int i = 0; i < few; ++i) {
                    value[i] = load(hidden + (m + i) * PANEL + c) + load(bias + c);
                    if (kept) {
                        T* to = kept + (m + i) * wide + c;
                        store(to, value[i]);
                        __builtin_prefetch(to + PANEL, 1);  // the next panel's
                    }
                }
                distribution(value, share);
                for (int i = 0; i < few; ++i) store(active + (m + i) * CHUNK + c, value[i] * share[i]);
            }
        });
}

// Threads share the places, or where these are few the inner channels; then their sums are added up.
template <class T, class R>
void forward(const R* x, const T* y, const Panels<Factor<T>>& expand, const float* bias,
             const Panels<Factor<T>>& contract, const float* out_bias, const float* scale, T* inner, R* out,
             long places, long n, long wide, bool by_places, int threads) {
    Buffer<float> sums(threads * ROWS * n);
    #pragma omp parallel num_threads(threads)
    {
        Share mine{omp_get_thread_num(), omp_get_num_threads()}, all{0, 1};
        Share of_places = by_places ? mine : all, of_inner = by_places ? all : mine;
        float *summed = by_places ? &sums[mine.index * ROWS * n] : sums.data(), *to = &sums[mine.index * ROWS * n];
        Buffer<Factor<T>> active(ROWS * CHUNK), buffer;
        Buffer<float> hidden(ROWS * PANEL);
        for (long start = of_places.first(places); start < of_places.last(places); start += ROWS) {
            long count = std::min(ROWS, of_places.last(places) - start);
            const Factor<T>* left = factors(y + start * n, count * n, buffer);
            long first = of_inner.first(wide, PANEL), last = of_inner.last(wide, PANEL);
            if (first == last) std::fill_n(to, count * n, 0.f);
            for (long j = first; j < last; j += CHUNK) {
                long chunk = std::min(CHUNK, last - j);
                for (long p = 0; p < chunk; p += PANEL) {
                    long panel = std::min(PANEL, chunk - p);
                    product(left, n, 1, expand.from(0, j + p), PANEL, hidden.data(), PANEL, count, panel, n, false);
                    activate(hidden.data(), bias + j + p, count, panel, &active[p],
                             inner ? inner + start * wide + j + p : nullptr, wide);
                }
                for (long p = 0; p < n; p += PANEL)
                    product(active.data(), CHUNK, 1, contract.from(j, p), PANEL, to + p, n, count,
                            std::min(PANEL, n - p), chunk, j > first);
            }
            if (!by_places) {
                #pragma omp barrier
            }
            for (long m = of_inner.first(count); m < of_inner.last(count); ++m)
                for (long c = 0; c < n; c += LANES) {
                    lanes sum = load(out_bias + c);
                    for (long s = 0; s < of_inner.number; ++s) sum += load(summed + (s * ROWS + m) * n + c);
                    long at = (start + m) * n + c;
                    store(out + at, load(x + at) + load(scale + c) * sum);
                }
            if (!by_places) {
                #pragma omp barrier
            }
        }
    }
}

}  // namespace

extern "C" {

// How bfloat16 is multiplied on this processor: as floats (0), in pairs by `product` (1), or by oneDNN alone (2).
long bfloat16_products() {
#if defined(__AVX512BF16__)
    return 1;
#elif defined(__ARM_FEATURE_BF16)
    return 2;
#else
    return 0;
#endif
}

// The weight [n, k] of a linear layer in panels of bfloat16 if half.
void feed_forward_panels(bool half, const float* weight, void* panels, long n, long k, long threads) {
    with_storage(half, [&](auto factor) { pack(weight, (decltype(factor)*)panels, n, k, threads); });
}

// out = x + scale * (contract(GELU(inner)) + out_bias), inner = expand(y) + bias, which is kept unless null.
// x and out [places, n] of bfloat16 if half_x; y [places, n] and inner [places, wide] if half; expand [n, wide] and
// contract [wide, n] in panels of y's factors.
void feed_forward(bool half, bool half_x, const void* x, const void* y, const void* expand, const float* bias,
                  const void* contract, const float* out_bias, const float* scale, void* inner, void* out, long places,
                  long n, long wide, bool by_places, long threads) {
    with_storage(half, [&](auto storage) {
        with_storage(half_x, [&](auto residual) {
            using T = decltype(storage);
            using R = decltype(residual);
            Panels<Factor<T>> first{(const Factor<T>*)expand, n}, second{(const Factor<T>*)contract, wide};
            forward((const R*)x, (const T*)y, first, bias, second, out_bias, scale, (T*)inner, (R*)out, places, n, wide,
                    by_places, threads);
        });
    });
}
}
