// What all kernels share: storage types, the product of small matrices, sums of channels.
//
// Tensors are channels-last, [places, channels], float32 or bfloat16; arithmetic is float32, sums over places float64
// but for the gradients of weights.
// Loops over channels are plain ones that the compiler vectorises.
#pragma once

#include <omp.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16, WIDE = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, WIDE = 2;
#else
constexpr int LANES = 4, WIDE = 4;
#endif
constexpr int TALL = 6;         // rows of a tile of `product`; its sums fill the registers
constexpr int BLOCK = 11 * TALL;  // rows that are worked on while they lie in the second-level cache

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

struct bfloat16 {
    uint16_t bits;
};

inline float get(float x) { return x; }
inline float get(bfloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
inline void put(float& to, float x) { to = x; }
inline void put(bfloat16& to, float x) {  // to the nearest, ties to even; a NaN stays one, whatever its bits
    uint32_t bits = __builtin_bit_cast(uint32_t, x);
    to.bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}

// LANES channels in a register, from and to any address.
typedef uint16_t shorts __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint32_t longs __attribute__((vector_size(4 * LANES)));
inline longs widened(shorts x) {
#ifdef __AVX512F__
    return (longs)_mm512_cvtepu16_epi32((__m256i)x);  // GCC 12 would do it in halves
#else
    return __builtin_convertvector(x, longs);
#endif
}
inline shorts rounded(lanes x) {  // to bfloat16, as `put` does
#ifdef __AVX512BF16__
    return (shorts)_mm512_cvtneps_pbh((__m512)x);
#else
    longs bits = (longs)x, upper = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector(x == x ? upper : 0x7fff + longs{}, shorts);
#endif
}
inline lanes load(const float* x) { return *(const lanes*)x; }
inline lanes load(const bfloat16* x) { return (lanes)(widened(*(const shorts*)x) << 16); }
inline void store(float* to, lanes x) { *(lanes*)to = x; }
inline void store(bfloat16* to, lanes x) { *(shorts*)to = rounded(x); }

// The first `count` channels, zeros behind them.
template <class T>
inline lanes load_some(const T* x, long count) {
    if (count >= LANES) return load(x);
    lanes some{};
    for (long c = 0; c < count; ++c) some[c] = get(x[c]);
    return some;
}

// Calls for x[n] to be brought into the cache.
template <class T>
inline void prefetch(const T* x, long n) {
    asm volatile("");  // an effect: without one, GCC leaves out calls of functions that do nothing else
    for (const char *at = (const char*)x, *end = (const char*)(x + n); at < end; at += 64) __builtin_prefetch(at);
}

// Calls f with a value of the storage type.
template <class F>
void with_storage(bool half, F f) {
    if (half) f(bfloat16{});
    else f(float{});
}

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

// sum + left * right in each lane; of pairs, both products are added.
inline lanes multiply_add(lanes sum, float left, lanes right) { return sum + left * right; }
#ifdef __AVX512BF16__
struct __attribute__((may_alias)) pair {  // two bfloat16 that lie side by side, the first in the lower half
    uint32_t bits;
};
inline lanes multiply_add(lanes sum, pair left, lanes right) {
    return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(left.bits), (__m512bh)right);
}
#endif

// c[HEIGHT, WIDTH * LANES] (+)= a[HEIGHT, k] b[k, WIDTH * LANES], the sums in registers.
template <int HEIGHT, int WIDTH, class T>
__attribute__((noinline)) void tile(const T* a, long a_row, long a_step, const T* b, long b_row, float* c, long c_row,
                                    long k, bool add) {
    lanes sums[HEIGHT][WIDTH];
    #pragma GCC unroll 6
    for (int i = 0; i < HEIGHT; ++i)
        #pragma GCC unroll 4
        for (int j = 0; j < WIDTH; ++j) {
            sums[i][j] = lanes{};
            __builtin_prefetch(c + i * c_row + j * LANES);
        }
    for (long t = 0; t < k; ++t) {
        lanes right[WIDTH];
        #pragma GCC unroll 4
        for (int j = 0; j < WIDTH; ++j) right[j] = ((const lanes*)(b + t * b_row))[j];
        #pragma GCC unroll 6
        for (int i = 0; i < HEIGHT; ++i) {
            T left = a[i * a_row + t * a_step];
            #pragma GCC unroll 4
            for (int j = 0; j < WIDTH; ++j) sums[i][j] = multiply_add(sums[i][j], left, right[j]);
        }
    }
    #pragma GCC unroll 6
    for (int i = 0; i < HEIGHT; ++i)
        #pragma GCC unroll 4
        for (int j = 0; j < WIDTH; ++j) {
            lanes& to = ((lanes*)(c + i * c_row))[j];
            to = add ? to + sums[i][j] : sums[i][j];
        }
}

// Calls f with min(n, LAST) >= 1 as a constant.
template <int LAST, class F>
inline void with_constant(long n, F f) {
    if constexpr (LAST > 1)
        if (n < LAST) return with_constant<LAST - 1>(n, f);
    f(std::integral_constant<int, LAST>{});
}

// c[m, n] (+)= a[m, k] b[k, n]; n is a multiple of 16. a[i, t] is a[i * a_row + t * a_step].
template <class T>
inline void product(const T* a, long a_row, long a_step, const T* b, long b_row, float* c, long c_row, long m, long n,
                    long k, bool add) {
    for (long j = 0; j < n; j += WIDE * LANES)
        with_constant<WIDE>((n - j) / LANES, [&](auto width) {
            for (long i = 0; i < m; i += TALL)
                with_constant<TALL>(m - i, [&](auto height) {
                    tile<height(), width()>(a + i * a_row, a_row, a_step, b + j, b_row, c + i * c_row + j, c_row, k,
                                            add);
                });
        });
}

// What rows of T are multiplied as: where no instruction multiplies bfloat16, as floats.
#ifdef __AVX512BF16__
template <class T>
using Factor = T;
#else
template <class T>
using Factor = float;
#endif

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
        buffer.need(round_up(count, LANES));
        for (long c = 0; c < count; c += LANES) store(&buffer[c], load_some(from + c, count - c));
        return buffer.data();
    }
}

// A product that sums over rows takes them STEP at a time: of bfloat16 pairs of two neighbouring rows, [rows / 2, n].
template <class F>
constexpr int STEP = std::is_same_v<F, bfloat16> ? 2 : 1;

// LANES channels of STEP rows.
inline void store_step(float* to, const lanes* rows) { store(to, rows[0]); }
inline void store_step(bfloat16* to, const lanes* rows) {
    *(lanes*)to = (lanes)(widened(rounded(rows[0])) | widened(rounded(rows[1])) << 16);
}

// to = rows [rows, n] in steps of rows, zeros after an odd last one
template <class F, class T>
void put_steps(const T* from, long rows, long n, F* to) {
    for (long m = 0; m < rows; m += STEP<F>)
        with_constant<STEP<F>>(rows - m, [&](auto there) {
            for (long c = 0; c < n; c += LANES) {
                lanes step[STEP<F>]{};
                for (int s = 0; s < there; ++s) step[s] = load(from + (m + s) * n + c);
                store_step(to + m * n + c * STEP<F>, step);
            }
        });
}

// c[m, n] (+)= a' b of a[k, m] and b[k, n] in steps of rows, zeros after an odd last row.
inline void product_over_rows(const float* a, long a_row, const float* b, long b_row, float* c, long c_row, long m,
                              long n, long k, bool add) {
    product(a, 1, a_row, b, b_row, c, c_row, m, n, k, add);
}

#ifdef __AVX512BF16__
inline void product_over_rows(const bfloat16* a, long a_row, const bfloat16* b, long b_row, float* c, long c_row,
                              long m, long n, long k, bool add) {
    product((const pair*)a, 1, a_row, (const pair*)b, b_row, c, c_row, m, n, (k + 1) / 2, add);
}

// The product of bfloat16: a[m, k] with k even and a_step 1, and b[k, n] in steps of rows.
inline void product(const bfloat16* a, long a_row, long, const bfloat16* b, long b_row, float* c, long c_row, long m,
                    long n, long k, bool add) {
    product((const pair*)a, a_row / 2, 1, (const pair*)b, b_row, c, c_row, m, n, k / 2, add);
}
#endif

// The lines of a volume along one axis: `outer` places before it, `size` along it, `inner` behind it.
struct Lines {
    long outer, size, inner;
    long start(long i) const { return i / inner * size * inner + i % inner; }  // the first place of the i-th line
};

// Sums over places of each channel and of its square. Those of a block come in float32, about one of its places: so a
// mean far from 0 costs no digits.
class Sums {
public:
    explicit Sums(long channels) : channels(channels), total(2 * channels) {}

    // LANES channels of `places` places, from c on: one of them, and sums of the differences from it.
    void add_block(long c, lanes one, lanes sum, lanes square, long places) {
        for (long i = 0; i < LANES; ++i) {
            double first = one[i];
            total[c + i] += sum[i] + places * first;
            total[channels + c + i] += square[i] + 2 * first * sum[i] + places * first * first;
        }
    }

    // Adds the sums [channels] and those of squares [channels].
    void add_to(double* sums) const {
        for (long c = 0; c < 2 * channels; ++c) sums[c] += total[c];
    }

private:
    long channels;
    std::vector<double> total;
};
