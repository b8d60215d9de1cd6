// The feed-forward part of a block, float32: expansion, GELU, contraction, and their gradients. Inner values exist in
// the cache only, but for those that the backward pass needs.
#include "arithmetic.h"

namespace {

constexpr long PANEL = 64, CHUNK = 2 * PANEL;  // inner channels that are worked on together

// Distribution and density of the standard normal distribution at x, of which GELU consists. exp(-x^2 / 2) is a power
// of 2; what lies beyond |x| is after Abramowitz and Stegun, 7.1.26, to 1e-7.
inline void normal(float x, float& distribution, float& density) {
    float size = std::min(std::abs(x), 13.f), power = size * size * -0.72134752f;  // log2(e) / 2
    float whole = (power + 12582912.f) - 12582912.f, f = power - whole;  // 1.5 * 2^23: to the nearest integer
    float rest = 1 + f * (0.69314718f + f * (0.24022651f + f * (0.05550411f + f * (0.00961813f + f * (
        0.00133336f + f * 0.00015469f)))));  // 2^f for |f| <= 1/2
    float bell = rest * __builtin_bit_cast(float, (int32_t(whole) + 127) << 23);
    float t = 1 / (1 + 0.23164190f * size);
    float beyond = bell * t * (0.12741480f + t * (-0.14224837f + t * (0.71070687f + t * (
        -0.72657601f + t * 0.53070271f))));
    distribution = x < 0 ? beyond : 1 - beyond;
    density = 0.39894228f * bell;
}

// A matrix [k, n] in panels of 64 columns, each [k, 64].
struct Panels {
    const float* at;
    long k;
    const float* from(long row, long column) const { return at + (column / PANEL * k + row) * PANEL; }
};

void forward(const float* x, const float* y, const Panels& expand, const float* bias, const Panels& contract,
             const float* out_bias, const float* scale, float* inner, float* out, long places, long n, long wide,
             int threads) {
    long rows = std::min<long>(2 * BLOCK, round_up((places + threads - 1) / threads, TALL));
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> left(rows * n), hidden(rows * CHUNK), sums(rows * n);
        #pragma omp for schedule(static)
        for (long start = 0; start < places; start += rows) {
            long count = std::min(rows, places - start), tall = round_up(count, TALL);
            std::copy_n(y + start * n, count * n, left.data());
            for (long j = 0; j < wide; j += CHUNK) {
                long chunk = std::min(CHUNK, wide - j);
                for (long p = 0; p < chunk; p += PANEL)
                    product(left.data(), n, 1, expand.from(0, j + p), PANEL, &hidden[p], CHUNK, tall,
                            std::min(PANEL, chunk - p), n, false);
                for (long m = 0; m < count; ++m) {
                    float* row = &hidden[m * CHUNK];
                    #pragma omp simd
                    for (long c = 0; c < chunk; ++c) row[c] += bias[j + c];
                    if (inner) std::copy_n(row, chunk, inner + (start + m) * wide + j);
                    #pragma omp simd
                    for (long c = 0; c < chunk; ++c) {
                        float distribution, density;
                        normal(row[c], distribution, density);
                        row[c] *= distribution;
                    }
                }
                for (long p = 0; p < n; p += PANEL)
                    product(hidden.data(), CHUNK, 1, contract.from(j, p), PANEL, &sums[p], n, tall,
                            std::min(PANEL, n - p), chunk, j > 0);
            }
            for (long m = 0; m < count; ++m) {
                const float *from = x + (start + m) * n, *sum = &sums[m * n];
                float* to = out + (start + m) * n;
                #pragma omp simd
                for (long c = 0; c < n; ++c) to[c] = from[c] + scale[c] * (sum[c] + out_bias[c]);
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
        std::vector<float> weights(n * PANEL), left(BLOCK * n + TALL), hidden(BLOCK * PANEL), d(BLOCK * PANEL + TALL);
        std::vector<float> of_contract(round_up(n, TALL) * PANEL), of_expand(round_up(PANEL, TALL) * n);
        #pragma omp for schedule(dynamic)
        for (long j = 0; j < wide; j += PANEL) {
            long panel = std::min(PANEL, wide - j);
            for (long c = 0; c < n; ++c)
                for (long i = 0; i < panel; ++i) weights[c * PANEL + i] = scale[c] * contract[c * wide + j + i];
            std::fill_n(d_bias + j, panel, 0.f);
            for (long start = 0; start < places; start += BLOCK) {
                long count = std::min<long>(BLOCK, places - start);
                std::copy_n(dy + start * n, count * n, left.data());
                product(left.data(), n, 1, weights.data(), PANEL, d.data(), PANEL, round_up(count, TALL), panel, n,
                        false);
                for (long m = 0; m < count; ++m) {
                    const float* values = inner + (start + m) * wide + j;
                    float *gradient = &d[m * PANEL], *active = &hidden[m * PANEL], *bias = d_bias + j;
                    #pragma omp simd
                    for (long c = 0; c < panel; ++c) {
                        float distribution, density, value = values[c];
                        normal(value, distribution, density);
                        active[c] = value * distribution;
                        gradient[c] *= distribution + value * density;
                        bias[c] += gradient[c];
                    }
                    std::copy_n(gradient, panel, d_inner + (start + m) * wide + j);
                }
                product(left.data(), 1, n, hidden.data(), PANEL, of_contract.data(), PANEL, round_up(n, TALL), panel,
                        count, start > 0);
                product(d.data(), 1, PANEL, y + start * n, n, of_expand.data(), n, round_up(panel, TALL), n, count,
                        start > 0);
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
// x, y, out [places, n], inner [places, wide], expand [n, wide] and contract [wide, n] in panels.
void feed_forward(bool, const float* x, const float* y, const float* expand, const float* bias, const float* contract,
                  const float* out_bias, const float* scale, float* inner, float* out, long places, long n, long wide,
                  long threads) {
    forward(x, y, {expand, n}, bias, {contract, wide}, out_bias, scale, inner, out, places, n, wide, threads);
}

// From dy [places, n], the gradient of `out`: those of inner [places, wide], of contract [n, wide], of scale (a row [n]
// for each 64 inner channels, without out_bias), of expand [wide, n] and its bias [wide].
void feed_forward_gradients(bool, const float* dy, const float* y, const float* inner, const float* contract,
                            const float* scale, float* d_inner, float* d_contract, float* d_scale, float* d_expand,
                            float* d_bias, long places, long n, long wide, long threads) {
    backward(dy, y, inner, contract, scale, d_inner, d_contract, d_scale, d_expand, d_bias, places, n, wide, threads);
}
}
