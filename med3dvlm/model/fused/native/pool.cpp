// Max pooling over 3 x 3 x 3 places, two apart; what lies beyond a border does not count, a NaN makes a NaN.
#include <limits>
#include <type_traits>

#include "arithmetic.h"

namespace {

// Numbers as integers in the same order, NaNs of either sign above all others: no maximum needs a look for NaNs.
// `Bits` are those of a float32 or a bfloat16.
template <class Bits>
struct Order {
    using Unsigned = std::make_unsigned_t<Bits>;
    static constexpr Bits MAX = std::numeric_limits<Bits>::max();
    static constexpr Bits NANS = sizeof(Bits) == 4 ? 0x7fffff : 0x7f;  // of one sign

    static Bits flipped(Bits x) { return x ^ (x >> (8 * sizeof(Bits) - 1) & MAX); }
    static Bits of(Bits x) { return Unsigned(flipped(x)) - NANS; }  // the lowest, negative NaNs, become the highest
    static Bits back(Bits x) { return flipped(Unsigned(x) + NANS); }
};

template <class Bits>
void pool(const Bits* x, Bits* y, long batch, long depth, long height, long width, long n, int threads) {
    using Order = Order<Bits>;
    long deep = (depth + 1) / 2, high = (height + 1) / 2, wide = (width + 1) / 2;
    #pragma omp parallel num_threads(threads)
    {
        std::vector<Bits> maxima(width * n);
        #pragma omp for schedule(static)
        for (long i = 0; i < batch * deep * high; ++i) {
            long b = i / high / deep, d = 2 * (i / high % deep), h = 2 * (i % high);
            const Bits* rows[9];  // at a border, the outermost twice
            for (int j = 0; j < 9; ++j) {
                long p = std::clamp(d + j / 3 - 1, 0L, depth - 1), q = std::clamp(h + j % 3 - 1, 0L, height - 1);
                rows[j] = x + ((b * depth + p) * height + q) * width * n;
            }
            Bits* to = maxima.data();
            #pragma omp simd
            for (long c = 0; c < width * n; ++c) {
                Bits most = Order::of(rows[0][c]);
                #pragma GCC unroll 8
                for (int j = 1; j < 9; ++j) most = std::max(most, Order::of(rows[j][c]));
                to[c] = most;
            }
            for (long w = 0; w < width; w += 2) {
                const Bits *left = to + std::max(w - 1, 0L) * n, *middle = to + w * n,
                           *right = to + std::min(w + 1, width - 1) * n;
                Bits* result = y + (i * wide + w / 2) * n;
                #pragma omp simd
                for (long c = 0; c < n; ++c) result[c] = Order::back(std::max(std::max(left[c], middle[c]), right[c]));
            }
        }
    }
}

}  // namespace

// x [batch, depth, height, width, n] -> y [batch, depth / 2, height / 2, width / 2, n], sizes rounded up
extern "C" void max_pool(bool half, const void* x, void* y, long batch, long depth, long height, long width, long n,
                         long threads) {
    if (half) pool((const int16_t*)x, (int16_t*)y, batch, depth, height, width, n, threads);
    else pool((const int32_t*)x, (int32_t*)y, batch, depth, height, width, n, threads);
}
