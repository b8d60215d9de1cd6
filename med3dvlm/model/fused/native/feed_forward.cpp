// The feed-forward part of a block: expansion, GELU, contraction, and their gradients. Inner values exist in the cache
// only, but for those that the backward pass needs.
#include <memory>

#include "arithmetic.h"

namespace {

constexpr long PANEL = 64;         // columns of a panel of weights
constexpr long CHUNK = 4 * PANEL;  // inner channels that are worked on together
constexpr long ROWS = 32 * TALL;   // places that are worked on together
constexpr int FEW = 4;             // of them, whose GELU is computed together
constexpr long CACHED = 1 << 16;   // weights of a layer that stay in the cache, with the other's and both's gradients

// A polynomial, the coefficient of its highest power first. Its steps wait for one another, so those of N registers
// alternate; as do all that follow.
template <int N, int COUNT>
[[gnu::always_inline]] inline void polynomial(const float (&factors)[COUNT], const lanes (&x)[N], lanes (&value)[N]) {
    #pragma GCC unroll 8
    for (int k = 0; k < COUNT; ++k)
        #pragma GCC unroll 4
        for (int i = 0; i < N; ++i) value[i] = k == 0 ? factors[0] + lanes{} : factors[k] + x[i] * value[i];
}

// The standard normal distribution. What it leaves beyond |x| is the 8th power of a polynomial, to 7e-7.
template <int N>
[[gnu::always_inline]] inline void distribution(const lanes (&x)[N], lanes (&share)[N]) {
    constexpr float ROOT[] = {3.48140361e-06f, -3.87045948e-05f, -2.52459376e-05f, 0.00159440457f,
                              -0.000745595957f, -0.0318981446f, -0.0914622992f, 0.917004168f};
    lanes size[N], root[N];
    for (int i = 0; i < N; ++i) {
        size[i] = x[i] < 0 ? -x[i] : x[i];
        size[i] = size[i] < 5.5f ? size[i] : 5.5f;
    }
    polynomial(ROOT, size, root);
    for (int power = 2; power <= 8; power *= 2)
        for (int i = 0; i < N; ++i) root[i] *= root[i];
    for (int i = 0; i < N; ++i) share[i] = x[i] < 0 ? root[i] : 1 - root[i];
}

// Its density: exp(-x^2 / 2), as a power of 2, over sqrt(2 pi).
template <int N>
[[gnu::always_inline]] inline void density(const lanes (&x)[N], lanes (&value)[N]) {
    typedef int32_t integers __attribute__((vector_size(4 * LANES)));
    constexpr float POWER[] = {0.00015469f, 0.00133336f, 0.00961813f, 0.05550411f, 0.24022651f, 0.69314718f, 1};
    lanes whole[N], part[N];
    for (int i = 0; i < N; ++i) {
        lanes power = x[i] * x[i] * -0.72134752f;  // log2(e) / 2
        power = power > -126.f ? power : -126.f;
        whole[i] = (power + 12582912.f) - 12582912.f;  // 1.5 * 2^23: to the nearest integer
        part[i] = power - whole[i];
    }
    polynomial(POWER, part, value);  // 2^part for |part| <= 1/2
    for (int i = 0; i < N; ++i)
        value[i] *= 0.39894228f * (lanes)((__builtin_convertvector(whole[i], integers) + 127) << 23);
}

// The part of n things that one of several threads takes, in whole units.
struct Share {
    long index, number;
    long first(long n, long unit = 1) const { return std::min(n, (n + unit - 1) / unit * index / number * unit); }
    long last(long n, long unit = 1) const { return Share{index + 1, number}.first(n, unit); }
};

// Memory that is written before it is read.
template <class F>
struct Buffer {
    std::unique_ptr<F[]> at;
    long count = 0;
    explicit Buffer(long n = 0) { need(n); }
    void need(long n) {
        if (n > count) at.reset(new F[n]), count = n;
    }
    F* data() { return at.get(); }
    F& operator[](long i) { return at[i]; }
};

// from[count] as factors of type F: where they lie, or in `buffer`.
template <class F, class T>
const F* factors(const T* from, long count, Buffer<F>& buffer) {
    if constexpr (std::is_same_v<F, T>) return from;
    else {
        buffer.need(count);
        for (long c = 0; c < count; c += LANES) store(&buffer[c], load(from + c));
        return buffer.data();
    }
}

// Rows [rows, n] for a product that sums over them: where they lie, or in steps of rows in `buffer`.
template <class F, class T>
const F* steps(const T* from, long rows, long n, Buffer<F>& buffer) {
    if constexpr (std::is_same_v<F, T> && STEP<F> == 1) return from;
    else {
        buffer.need(round_up(rows, STEP<F>) * n);
        for (long m = 0; m < rows; m += STEP<F>)
            with_constant<STEP<F>>(rows - m, [&](auto there) {
                for (long c = 0; c < n; c += LANES) {
                    lanes step[STEP<F>]{};
                    for (int s = 0; s < there; ++s) step[s] = load(from + (m + s) * n + c);
                    store_step(&buffer[m * n + c * STEP<F>], step);
                }
            });
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

// The gradients of a feed-forward part. Those of weights are summed over a share of the places, those of y over a share
// of the inner channels, each by one thread.
template <class T>
struct Gradients {
    using F = Factor<T>;
    const float* dy;
    const T *y, *inner;
    const float *expand, *contract, *scale;
    float *d_y, *d_expand, *d_bias, *d_contract, *d_scale;
    long n, wide;
    long chunk = std::max(CACHED / n / PANEL, 1L) * PANEL;
    Buffer<float> behind{ROWS * PANEL}, of_contract{chunk * n};
    Buffer<F> back{chunk * n};  // like of_contract in panels, [n, 64] each
    Buffer<F> before{ROWS * PANEL}, d{ROWS * PANEL}, hidden{ROWS * PANEL};
    Buffer<F> expand_steps{}, dy_rows{}, dy_steps{}, y_steps{};

    // Places [first, last), inner channels [j, end) of at most `chunk`; d_y is set by the first ones, and added to.
    void take(long first, long last, long j, long end, bool set) {
        turn(j, end);
        const F* forth = steps(expand + j * n, end - j, n, expand_steps);
        std::fill(d_bias + j, d_bias + end, 0.f);
        for (long start = first; start < last; start += ROWS) {
            long count = std::min(ROWS, last - start);
            const F* above = factors(dy + start * n, count * n, dy_rows);
            const F* left = steps(dy + start * n, count, n, dy_steps);
            const F* right = steps(y + start * n, count, n, y_steps);
            for (long p = j; p < end; p += PANEL) {
                long panel = std::min(PANEL, end - p);
                product(above, n, 1, &back[(p - j) * n], PANEL, behind.data(), PANEL, count, panel, n, false);
                activate_back(inner + start * wide + p, count, panel, d_bias + p);
                product_over_rows(left, n, hidden.data(), PANEL, &of_contract[(p - j) * n], PANEL, n, panel, count,
                                  start > first);
                product_over_rows(d.data(), PANEL, right, n, d_expand + p * n, n, panel, n, count, start > first);
                const F* rows = STEP<F> > 1 ? before.data() : d.data();
                product(rows, PANEL, 1, forth + (p - j) * n, n, d_y + start * n, n, count, n, panel, !set || p > j);
            }
        }
        for (long p = j; p < end; p += PANEL) finish(&of_contract[(p - j) * n], p, std::min(PANEL, end - p));
    }

    // back = scale * contract' of inner channels [j, end)
    void turn(long j, long end) {
        for (long p = j; p < end; p += PANEL)
            for (long c = 0; c < n; c += STEP<F>)
                for (long i = 0; i < std::min(PANEL, end - p); i += LANES) {
                    lanes step[STEP<F>];
                    for (int s = 0; s < STEP<F>; ++s) step[s] = scale[c + s] * load(contract + (c + s) * wide + p + i);
                    store_step(&back[(p - j) * n + c * PANEL + i * STEP<F>], step);
                }
    }

    // From behind[rows, PANEL], the gradient behind GELU: that before it as rows (unless steps are) and in steps, which
    // `hidden`, the GELU itself, is in as well.
    void activate_back(const T* from, long rows, long columns, float* of_bias) {
        for (long m = 0; m < rows; m += FEW)
            with_constant<FEW>(rows - m, [&](auto few) {
                for (long c = 0; c < columns; c += LANES) {
                    lanes value[few], share[few], slope[few], active[FEW]{}, gradient[FEW]{}, sum = load(of_bias + c);
                    for (int i = 0; i < few; ++i) {
                        const T* at = from + (m + i) * wide + c;
                        __builtin_prefetch(at + PANEL);  // the next panel's
                        value[i] = load(at);
                    }
                    distribution(value, share);
                    density(value, slope);
                    for (int i = 0; i < few; ++i) {
                        active[i] = value[i] * share[i];
                        gradient[i] = (share[i] + value[i] * slope[i]) * load(&behind[(m + i) * PANEL + c]);
                        if (STEP<F> > 1) store(&before[(m + i) * PANEL + c], gradient[i]);
                        sum += gradient[i];
                    }
                    for (int i = 0; i < few; i += STEP<F>) {
                        store_step(&hidden[(m + i) * PANEL + c * STEP<F>], active + i);
                        store_step(&d[(m + i) * PANEL + c * STEP<F>], gradient + i);
                    }
                    store(of_bias + c, sum);
                }
            });
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
