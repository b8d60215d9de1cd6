// The feed-forward part of a block: expansion, GELU, contraction, and their gradients. Inner values exist in the cache
// only, but for those that the backward pass needs.
#include <type_traits>

#include "arithmetic.h"

namespace {

constexpr long PANEL = 64;         // columns of a panel of weights
constexpr long CHUNK = 4 * PANEL;  // inner channels that are worked on together
constexpr long ROWS = 16 * TALL;   // places that are worked on together

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

// What `product` takes of a row of T.
template <class T>
using Factor = std::conditional_t<std::is_same_v<T, bfloat16>, pair, float>;
template <class T>
constexpr long PER_FACTOR = sizeof(Factor<T>) / sizeof(T);

template <class T>
const Factor<T>* factors(const T* row) { return (const Factor<T>*)row; }

// A matrix [k, n] of factors in panels of 64 columns, each [k, 64].
template <class T>
struct Panels {
    const Factor<T>* at;
    long k;
    const Factor<T>* from(long row, long column) const { return at + (column / PANEL * k + row) * PANEL; }
};

// active[rows, CHUNK] = GELU(hidden[rows, PANEL] + bias) in n columns; its argument is kept [rows, wide] unless null.
template <class T>
void activate(const float* hidden, const float* bias, long rows, long n, T* active, T* kept, long wide) {
    for (long m = 0; m < rows; ++m)
        for (long c = 0; c < n; c += LANES) {
            lanes value = load(hidden + m * PANEL + c) + load(bias + c);
            if (kept) store(kept + m * wide + c, value);
            store(active + m * CHUNK + c, value * distribution(value));
        }
}

// A thread takes places that follow each other.
template <class T>
void forward(const T* x, const T* y, const Panels<T>& expand, const float* bias, const Panels<T>& contract,
             const float* out_bias, const float* scale, T* inner, T* out, long places, long n, long wide,
             int threads) {
    constexpr long PER = PER_FACTOR<T>;
    #pragma omp parallel num_threads(threads)
    {
        long first = places * omp_get_thread_num() / omp_get_num_threads();
        long last = places * (omp_get_thread_num() + 1) / omp_get_num_threads();
        std::vector<T> active(ROWS * CHUNK);
        std::vector<float> hidden(ROWS * PANEL), sums(ROWS * n);
        for (long start = first; start < last; start += ROWS) {
            long count = std::min(ROWS, last - start);
            for (long j = 0; j < wide; j += CHUNK) {
                long chunk = std::min(CHUNK, wide - j);
                for (long p = 0; p < chunk; p += PANEL) {
                    long panel = std::min(PANEL, chunk - p);
                    product(factors(y + start * n), n / PER, 1, expand.from(0, j + p), PANEL, hidden.data(), PANEL,
                            count, panel, n / PER, false);
                    activate(hidden.data(), bias + j + p, count, panel, &active[p],
                             inner ? inner + start * wide + j + p : nullptr, wide);
                }
                for (long p = 0; p < n; p += PANEL)
                    product(factors(active.data()), CHUNK / PER, 1, contract.from(j / PER, p), PANEL, &sums[p], n,
                            count, std::min(PANEL, n - p), chunk / PER, j > 0);
            }
            for (long m = 0; m < count; ++m) {
                const T* from = x + (start + m) * n;
                const float* sum = &sums[m * n];
                T* to = out + (start + m) * n;
                #pragma omp simd
                for (long c = 0; c < n; ++c) put(to[c], get(from[c]) + scale[c] * (sum[c] + out_bias[c]));
            }
        }
    }
}

// Each thread takes 64 inner channels at a time and all places, so that no gradient is summed up across threads.
void backward(const float* dy, const float* y, const float* inner, const float* contract, const float* scale,
              float* d_inner, float* d_contract, float* d_scale, float* d_expand, float* d_bias, long places, long n,
              long wide, int threads) {
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> weights(n * PANEL), hidden(ROWS * PANEL), d(ROWS * PANEL);
        std::vector<float> of_contract(n * PANEL), of_expand(PANEL * n);
        #pragma omp for schedule(dynamic)
        for (long j = 0; j < wide; j += PANEL) {
            long panel = std::min(PANEL, wide - j);
            for (long c = 0; c < n; ++c)
                for (long i = 0; i < panel; ++i) weights[c * PANEL + i] = scale[c] * contract[c * wide + j + i];
            std::fill_n(d_bias + j, panel, 0.f);
            for (long start = 0; start < places; start += ROWS) {
                long count = std::min(ROWS, places - start);
                const float* left = dy + start * n;
                product(left, n, 1, weights.data(), PANEL, d.data(), PANEL, count, panel, n, false);
                for (long m = 0; m < count; ++m)
                    for (long c = 0; c < panel; c += LANES) {
                        long at = (start + m) * wide + j + c;
                        lanes value = load(inner + at), share = distribution(value);
                        lanes gradient = (share + value * density(value)) * load(&d[m * PANEL + c]);
                        store(&hidden[m * PANEL + c], value * share);
                        store(&d[m * PANEL + c], gradient);
                        store(d_inner + at, gradient);
                        store(d_bias + j + c, load(d_bias + j + c) + gradient);
                    }
                product(left, 1, n, hidden.data(), PANEL, of_contract.data(), PANEL, n, panel, count, start > 0);
                product(d.data(), 1, PANEL, y + start * n, n, of_expand.data(), n, panel, n, count, start > 0);
            }
            for (long c = 0; c < n; ++c) {
                const float *from = &of_contract[c * PANEL], *row = contract + c * wide + j;
                float of_scale = 0;
                #pragma omp simd reduction(+ : of_scale)
                for (long i = 0; i < panel; ++i) {
                    of_scale += from[i] * row[i];
                    d_contract[c * wide + j + i] = scale[c] * from[i];
                }
                d_scale[j / PANEL * n + c] = of_scale;
            }
            std::copy_n(of_expand.data(), panel * n, d_expand + j * n);
        }
    }
}

}  // namespace

extern "C" {

// out = x + scale * (contract(GELU(inner)) + out_bias), inner = expand(y) + bias, which is kept unless null.
// x, y, out [places, n], inner [places, wide], expand [n, wide] and contract [wide, n] in panels, of bfloat16 in pairs.
void feed_forward(bool half, const void* x, const void* y, const void* expand, const float* bias, const void* contract,
                  const float* out_bias, const float* scale, void* inner, void* out, long places, long n, long wide,
                  long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        Panels<T> first{factors((const T*)expand), n / PER_FACTOR<T>};
        Panels<T> second{factors((const T*)contract), wide / PER_FACTOR<T>};
        forward((const T*)x, (const T*)y, first, bias, second, out_bias, scale, (T*)inner, (T*)out, places, n, wide,
                threads);
    });
}

// From dy [places, n], the gradient of `out`: those of inner [places, wide], of contract [n, wide], of scale (a row [n]
// for each 64 inner channels, without out_bias), of expand [wide, n] and its bias [wide].
void feed_forward_gradients(bool, const float* dy, const float* y, const float* inner, const float* contract,
                            const float* scale, float* d_inner, float* d_contract, float* d_scale, float* d_expand,
                            float* d_bias, long places, long n, long wide, long threads) {
    backward(dy, y, inner, contract, scale, d_inner, d_contract, d_scale, d_expand, d_bias, places, n, wide, threads);
}
}
