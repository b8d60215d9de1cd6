// Max pooling over 3 x 3 x 3 places, two apart, and its gradient; what lies beyond a border does not count, a NaN makes
// a NaN. Of equal values the first counts, as in torch: flat regions would otherwise have other gradients.
#include <limits>

#include "arithmetic.h"

namespace {

// Numbers as integers in the same order, both zeros as 0, NaNs of either sign above all others: no maximum needs a look
// for NaNs. `Bits` are those of a float32 or a bfloat16.
template <class Bits>
struct Order {
    using Unsigned = std::make_unsigned_t<Bits>;
    static constexpr Bits MAX = std::numeric_limits<Bits>::max();
    static constexpr Bits BELOW = sizeof(Bits) == 4 ? 0x800000 : 0x80;  // numbers below -inf: NaNs, and the one unused

    static Bits sign(Bits x) { return x >> (8 * sizeof(Bits) - 1); }  // -1 or 0
    static Bits of(Bits x) {  // the lowest, negative NaNs, become the highest
        return Unsigned(x ^ (sign(x) & MAX)) - Unsigned(sign(x)) - BELOW;
    }
    static Bits back(Bits x) {
        Bits number = Unsigned(x) + BELOW, ones = Unsigned(number) + Unsigned(sign(number));
        return ones ^ (sign(number) & MAX);
    }
};

struct Sizes {
    long batch, depth, height, width, n;
    Sizes halved() const { return {batch, (depth + 1) / 2, (height + 1) / 2, (width + 1) / 2, n}; }
};

// With PLACES, it is remembered which of the 27 inputs each maximum is: the first of equal ones.
template <bool PLACES, class Bits>
void pool(const Bits* x, Bits* y, uint8_t* places, const Sizes& size, int threads) {
    using Order = Order<Bits>;
    Sizes half = size.halved();
    long width = size.width, n = size.n;
    #pragma omp parallel num_threads(threads)
    {
        std::vector<Bits> maxima(width * n), of_rows(PLACES ? width * n : 0);
        #pragma omp for schedule(static)
        for (long i = 0; i < half.batch * half.depth * half.height; ++i) {
            long b = i / half.height / half.depth, d = 2 * (i / half.height % half.depth), h = 2 * (i % half.height);
            const Bits* rows[9];  // at a border, the outermost twice
            Bits row[9];
            for (int j = 0; j < 9; ++j) {
                long p = std::clamp(d + j / 3 - 1, 0L, size.depth - 1);
                long q = std::clamp(h + j % 3 - 1, 0L, size.height - 1);
                rows[j] = x + ((b * size.depth + p) * size.height + q) * width * n;
                row[j] = 9 * (p - d + 1) + 3 * (q - h + 1);
            }
            Bits *most_of = maxima.data(), *row_of = of_rows.data();
            #pragma omp simd
            for (long c = 0; c < width * n; ++c) {
                Bits most = Order::of(rows[0][c]), best = row[0];
                #pragma GCC unroll 8
                for (int j = 1; j < 9; ++j) {
                    Bits value = Order::of(rows[j][c]);
                    if constexpr (PLACES) best = value > most ? row[j] : best;
                    most = std::max(most, value);
                }
                most_of[c] = most;
                if constexpr (PLACES) row_of[c] = best;
            }
            for (long w = 0; w < width; w += 2) {
                long left = std::max(w - 1, 0L), right = std::min(w + 1, width - 1), columns[] = {left, w, right};
                long to = (i * half.width + w / 2) * n;
                #pragma omp simd
                for (long c = 0; c < n; ++c) {
                    Bits most = most_of[left * n + c], best = 0;
                    if constexpr (PLACES) best = row_of[left * n + c] + left - w + 1;
                    #pragma GCC unroll 2
                    for (int j = 1; j < 3; ++j) {
                        Bits value = most_of[columns[j] * n + c];
                        if constexpr (PLACES) {
                            Bits place = row_of[columns[j] * n + c] + columns[j] - w + 1;
                            best = value > most || (value == most && place < best) ? place : best;
                        }
                        most = std::max(most, value);
                    }
                    y[to + c] = Order::back(most);
                    if constexpr (PLACES) places[to + c] = best;
                }
            }
        }
    }
}

// A row of outputs that look at a row of inputs; `place` is that of the first of the three inputs along the row.
template <class T>
struct Look {
    const T* dy;
    const uint8_t* places;
    int place;
};

// dx[n] = the gradients of those outputs, the w-th and if PAIR the next one of each row, whose choice was this input
template <int ROWS, bool PAIR, class T>
void gather(const Look<T>* looks, long w, int column, T* dx, long n) {
    #pragma omp simd
    for (long c = 0; c < n; ++c) {
        float sum = 0;
        #pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
            const Look<T>& look = looks[i];
            long at = w * n + c;
            sum += look.places[at] == look.place + column ? get(look.dy[at]) : 0.f;
            if (PAIR) sum += look.places[at + n] == look.place ? get(look.dy[at + n]) : 0.f;
        }
        put(dx[c], sum);
    }
}

template <class T>
void gradient(const T* dy, const uint8_t* places, T* dx, const Sizes& size, int threads) {
    Sizes half = size.halved();
    long n = size.n;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < size.batch * size.depth * size.height; ++row) {
        long h = row % size.height, d = row / size.height % size.depth, b = row / size.height / size.depth;
        Look<T> looks[4];
        int count = 0;
        for (long p = d / 2; p <= std::min((d + 1) / 2, half.depth - 1); ++p)
            for (long q = h / 2; q <= std::min((h + 1) / 2, half.height - 1); ++q) {
                long from = ((b * half.depth + p) * half.height + q) * half.width * n;
                looks[count++] = {dy + from, places + from, int(9 * (d - 2 * p + 1) + 3 * (h - 2 * q + 1))};
            }
        with_constant<4>(count, [&](auto rows) {
            for (long w = 0; w < size.width; ++w) {
                T* to = dx + (row * size.width + w) * n;
                if (w % 2 == 0) gather<rows(), false>(looks, w / 2, 1, to, n);
                else if (w / 2 + 1 == half.width) gather<rows(), false>(looks, w / 2, 2, to, n);
                else gather<rows(), true>(looks, w / 2, 2, to, n);
            }
        });
    }
}

}  // namespace

extern "C" {

// x [batch, depth, height, width, n] -> y [batch, depth / 2, height / 2, width / 2, n], sizes rounded up, and unless
// null places like y, which of the 27 inputs it was.
void max_pool(bool half, const void* x, void* y, uint8_t* places, long batch, long depth, long height, long width,
              long n, long threads) {
    Sizes size{batch, depth, height, width, n};
    auto run = [&](auto bits) {
        using Bits = decltype(bits);
        if (places) pool<true>((const Bits*)x, (Bits*)y, places, size, threads);
        else pool<false>((const Bits*)x, (Bits*)y, places, size, threads);
    };
    if (half) run(int16_t{});
    else run(int32_t{});
}

// dx, sizes as of x, from dy and places, sizes as of y
void max_pool_gradient(bool half, const void* dy, const uint8_t* places, void* dx, long batch, long depth, long height,
                       long width, long n, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        gradient((const T*)dy, places, (T*)dx, {batch, depth, height, width, n}, threads);
    });
}
}
