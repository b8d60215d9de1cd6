// The gradients of a feed-forward part, from the inner values that its forward pass kept.
#include "feed_forward.h"

namespace {

constexpr long CACHED = 1 << 16;  // weights of a layer that stay in the cache, with the other's and both's gradients

// Rows [rows, n] for a product that sums over them: where they lie, or in steps of rows in `buffer`.
template <class F, class T>
const F* steps(const T* from, long rows, long n, Buffer<F>& buffer) {
    if constexpr (std::is_same_v<F, T> && STEP<F> == 1) return from;
    else {
        buffer.need(round_up(rows, STEP<F>) * n);
        put_steps(from, rows, n, buffer.data());
        return buffer.data();
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

// From dy [places, n], the gradient of `out`: those of y [places, n] for each share of the inner channels, and for each
// share of the places those of expand [wide, n], its bias [wide], contract [n, wide]. That of scale [n] (without
// out_bias) for each of both is added.
extern "C" void feed_forward_gradients(bool half, const float* dy, const void* y, const void* inner,
                                       const float* expand, const float* contract, const float* scale, float* d_y,
                                       float* d_expand, float* d_bias, float* d_contract, float* d_scale, long places,
                                       long n, long wide, long place_shares, long inner_shares, long threads) {
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
