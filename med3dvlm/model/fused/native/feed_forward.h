// What both directions of a feed-forward part share: GELU, and rows as factors of products.
#pragma once

#include "arithmetic.h"

constexpr long PANEL = 64;        // columns of a panel of weights
constexpr long ROWS = 32 * TALL;  // places that are worked on together
constexpr int FEW = 4;            // of them, whose GELU is computed together

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
