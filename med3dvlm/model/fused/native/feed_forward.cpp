// The feed-forward part of a block: expansion, GELU, contraction, and their gradients. Inner values exist in the cache
// only, but for those that the backward pass needs.
#include <memory>

#include "arithmetic.h"

namespace {

constexpr long PANEL = 64;         // columns of a panel of weights
constexpr long CHUNK = 4 * PANEL;  // inner channels that are worked on together
constexpr long ROWS = 16 * TALL;   // places that are worked on together
constexpr long CACHED = 1 << 16;   // weights of a layer that stay in the cache, with the other's and both's gradients

// The standard normal distribution. What it leaves beyond |x| is the 8th power of a polynomial, to 7e-7.
inline lanes distribution(lanes x) {
    lanes size = x < 0 ? -x : x;
    size = size < 5.5f ? size : 5.5f;
    lanes root = 0.917004168f + size * (-0.0914622992f + size * (-0.0318981446f + size * (-0.000745595957f + size * (
        0.00159440457f + size * (-2.52459376e-05f + size * (-3.87045948e-05f + size * 3.48140361e-06f))))));
    lanes square = root * root, fourth = square * square, beyond = fourth * fourth;
    return x < 0 ? beyond : 1 - beyond;
}

// Its density: exp(-x^2 / 2), as a power of 2, over sqrt(2 pi).
inline lanes density(lanes x) {
    typedef int32_t integers __attribute__((vector_size(4 * LANES)));
    lanes power = x * x * -0.72134752f;  // log2(e) / 2
    power = power > -126.f ? power : -126.f;
    lanes whole = (power + 12582912.f) - 12582912.f, f = power - whole;  // 1.5 * 2^23: to the nearest integer
    lanes part = 1 + f * (0.69314718f + f * (0.24022651f + f * (0.05550411f + f * (0.00961813f + f * (
        0.00133336f + f * 0.00015469f)))));  // 2^f for |f| <= 1/2
    return 0.39894228f * part * (lanes)((__builtin_convertvector(whole, integers) + 127) << 23);
}

// The part of n things that one of several threads takes, in whole units.
struct Share {
    long index, number;
    long first(long n, long unit = 1) const { return std::min(n, (n + unit - 1) / unit * index / number * unit); }
    long last(long n, long unit = 1) const { return Share{index + 1, number}.first(n, unit); }
};

// What rows of T are multiplied as: where no instruction multiplies bfloat16, as floats.
#ifdef __AVX512BF16__
template <class T>
using Factor = T;
#else
template <class T>
using Factor = float;
#endif

// from[count] as factors of type F: where they lie, or in `buffer`.
template <class F, class T>
const F* factors(const T* from, long count, std::vector<F>& buffer) {
    if constexpr (std::is_same_v<F, T>) return from;
    else {
        buffer.resize(count);
        for (long c = 0; c < count; c += LANES) store(&buffer[c], load(from + c));
        return buffer.data();
    }
}

// A matrix [k, n] of factors in panels of 64 columns, each [k, 64].
template <class F>
struct Panels {
    const F* at;
    long k;
    const F* from(long row, long column) const { return at + (column / PANEL * k + row) * PANEL; }
};

// active[rows, CHUNK] = GELU(hidden[rows, PANEL] + bias) in n columns; its argument is kept [rows, wide] unless null.
template <class F, class T>
void activate(const float* hidden, const float* bias, long rows, long n, F* active, T* kept, long wide) {
    for (long m = 0; m < rows; ++m)
        for (long c = 0; c < n; c += LANES) {
            lanes value = load(hidden + m * PANEL + c) + load(bias + c);
            if (kept) store(kept + m * wide + c, value);
            store(active + m * CHUNK + c, value * distribution(value));
        }
}

// Threads share the places, or where these are few the inner channels; then their sums are added up.
template <class T, class R>
void forward(const R* x, const T* y, const Panels<Factor<T>>& expand, const float* bias,
             const Panels<Factor<T>>& contract, const float* out_bias, const float* scale, T* inner, R* out,
             long places, long n, long wide, bool by_places, int threads) {
    std::unique_ptr<float[]> sums(new float[threads * ROWS * n]);
    #pragma omp parallel num_threads(threads)
    {
        Share mine{omp_get_thread_num(), omp_get_num_threads()}, all{0, 1};
        Share of_places = by_places ? mine : all, of_inner = by_places ? all : mine;
        float *summed = by_places ? &sums[mine.index * ROWS * n] : sums.get(), *to = &sums[mine.index * ROWS * n];
        std::vector<Factor<T>> active(ROWS * CHUNK), buffer;
        std::vector<float> hidden(ROWS * PANEL);
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

// The gradients of a feed-forward part. Those of weights are summed over a share of the places, those of y over a share
// of the inner channels, each by one thread.
template <class T>
struct Gradients {
    const float* dy;
    const T *y, *inner;
    const float *expand, *contract, *scale;
    float *d_y, *d_expand, *d_bias, *d_contract, *d_scale;
    long n, wide;
    long chunk = std::max(CACHED / n / PANEL, 1L) * PANEL;
    std::vector<float> hidden = std::vector<float>(ROWS * PANEL), d = hidden, buffer = {};
    std::vector<float> back = std::vector<float>(chunk * n), of_contract = back;  // in panels, [n, 64] each

    // Places [first, last), inner channels [j, end) of at most `chunk`; d_y is set by the first ones, and added to.
    void take(long first, long last, long j, long end, bool set) {
        for (long p = j; p < end; p += PANEL)
            for (long c = 0; c < n; ++c)
                for (long i = 0; i < std::min(PANEL, end - p); ++i)
                    back[(p - j) * n + c * PANEL + i] = scale[c] * contract[c * wide + p + i];
        std::fill(d_bias + j, d_bias + end, 0.f);
        for (long start = first; start < last; start += ROWS) {
            long count = std::min(ROWS, last - start);
            const float *left = dy + start * n, *right = factors(y + start * n, count * n, buffer);
            for (long p = j; p < end; p += PANEL) {
                long panel = std::min(PANEL, end - p);
                product(left, n, 1, &back[(p - j) * n], PANEL, d.data(), PANEL, count, panel, n, false);
                activate_back(inner + start * wide + p, count, panel, d_bias + p);
                product(left, 1, n, hidden.data(), PANEL, &of_contract[(p - j) * n], PANEL, n, panel, count,
                        start > first);
                product(d.data(), 1, PANEL, right, n, d_expand + p * n, n, panel, n, count, start > first);
                product(d.data(), PANEL, 1, expand + p * n, n, d_y + start * n, n, count, n, panel, !set || p > j);
            }
        }
        for (long p = j; p < end; p += PANEL) finish(&of_contract[(p - j) * n], p, std::min(PANEL, end - p));
    }

    // d[rows, PANEL], the gradient behind GELU, becomes that before it; hidden[rows, PANEL] = GELU.
    void activate_back(const T* from, long rows, long columns, float* of_bias) {
        for (long m = 0; m < rows; ++m)
            for (long c = 0; c < columns; c += LANES) {
                __builtin_prefetch(from + m * wide + c + PANEL);  // the next panel's
                lanes value = load(from + m * wide + c), share = distribution(value);
                lanes gradient = (share + value * density(value)) * load(&d[m * PANEL + c]);
                store(&hidden[m * PANEL + c], value * share);
                store(&d[m * PANEL + c], gradient);
                store(of_bias + c, load(of_bias + c) + gradient);
            }
    }

    // From the products of dy and GELU [n, PANEL], those of inner channels j and following.
    void finish(const float* from, long j, long columns) {
        for (long c = 0; c < n; ++c, from += PANEL) {
            const float* row = contract + c * wide + j;
            float *to = d_contract + c * wide + j, of_scale = 0;
            #pragma omp simd reduction(+ : of_scale)
            for (long i = 0; i < columns; ++i) {
                of_scale += from[i] * row[i];
                to[i] = scale[c] * from[i];
            }
            d_scale[c] += of_scale;
        }
    }
};

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

// From dy [places, n], the gradient of `out`: those of y [places, n] for each share of the inner channels, and for each
// share of the places those of expand [wide, n], its bias [wide], contract [n, wide]. That of scale [n] (without
// out_bias) for each of both is added.
void feed_forward_gradients(bool half, const float* dy, const void* y, const void* inner, const float* expand,
                            const float* contract, const float* scale, float* d_y, float* d_expand, float* d_bias,
                            float* d_contract, float* d_scale, long places, long n, long wide, long place_shares,
                            long inner_shares, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        #pragma omp parallel for num_threads(threads)
        for (long i = 0; i < place_shares * inner_shares; ++i) {
            Share of_places{i % place_shares, place_shares}, of_inner{i / place_shares, inner_shares};
            long p = of_places.index;
            Gradients<T> of{dy, (const T*)y, (const T*)inner, expand, contract, scale,
                            d_y + of_inner.index * places * n, d_expand + p * wide * n, d_bias + p * wide,
                            d_contract + p * n * wide, d_scale + i * n, n, wide};
            long first = of_inner.first(wide, PANEL), last = of_inner.last(wide, PANEL);
            for (long j = first; j < last; j += of.chunk)
                of.take(of_places.first(places), of_places.last(places), j, std::min(j + of.chunk, last), j == first);
        }
    });
}
}
