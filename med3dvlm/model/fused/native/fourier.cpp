// The whole stem as one convolution by fast Fourier transforms, for inference.
//
// Its input are PHASES values at each place of the stem's grid: the voxels 4 g to 4 g + 3 along each axis, and 1
// (`med3dvlm.model.fused.fourier`). The grid is cut into tiles of 16 x 16 x 16 places; each needs 24 x 24 x 24.
// Two tiles are the real and the imaginary part of one transform: the kernels are real, so they do not mix.
// Along an axis of 24 there are no twiddle factors: 3 and 8 have no common divisor (Good and Thomas).
#include <memory>

#include "arithmetic.h"

namespace {

constexpr int N = 24, OUT = 16, BEFORE = 4;      // places of a transform, of them kept, of them before those
constexpr int PHASES = 11, SLOTS = 16, VECTORS = SLOTS / LANES;  // of them unused: five slots
constexpr int HALF = N / 2 + 1;                  // planes of weights; the others are their mirror images
constexpr int PLANE = N * N, STRIDE = PLANE + 1;  // one more, so that neighbours along D do not share cache lines
constexpr int FIELD = OUT * OUT + 1;             // places (D, H) of a tile, and one more for the same reason
constexpr int AHEAD = 12 * PHASES * 2 * LANES;   // how far weights are fetched before they are needed
constexpr int TOGETHER = 4;                      // pairs of tiles that meet each weight in registers

struct alignas(4 * LANES) Complex {
    lanes re, im;
};
inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex operator*(float a, Complex b) { return {a * b.re, a * b.im}; }

// x / i forwards, x * i backwards
template <bool BACK>
inline Complex quarter(Complex x) {
    return BACK ? Complex{-x.im, x.re} : Complex{x.im, -x.re};
}

template <bool BACK>
inline void transform4(Complex a, Complex b, Complex c, Complex d, Complex* to, int step) {
    Complex even = a + c, odd = quarter<BACK>(b - d);
    to[0] = even + (b + d);
    to[2 * step] = even - (b + d);
    to[step] = (a - c) + odd;
    to[3 * step] = (a - c) - odd;
}

template <bool BACK>
inline void transform8(const Complex* x, Complex* to) {
    Complex a = x[1] - x[5], b = x[3] - x[7];
    constexpr float ROOT = 0.70710678f;  // of 1/2
    transform4<BACK>(x[0] + x[4], x[1] + x[5], x[2] + x[6], x[3] + x[7], to, 2);
    transform4<BACK>(x[0] - x[4], ROOT * (a + quarter<BACK>(a)), quarter<BACK>(x[2] - x[6]),
                     ROOT * (quarter<BACK>(b) - b), to + 1, 2);
}

// out(k, sum over n of in(n) exp(-+ 2 pi i n k / 24)) for the 24 k
template <bool BACK, class In, class Out>
inline void transform(In in, Out out) {
    Complex few[8], many[N];
    #pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
        #pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) few[j] = in((8 * i + 3 * j) % N);
        transform8<BACK>(few, many + 8 * i);
    }
    #pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
        Complex sum = many[8 + j] + many[16 + j], rest = many[j] - 0.5f * sum;
        Complex turned = 0.86602540f * quarter<BACK>(many[8 + j] - many[16 + j]);
        out(9 * j % N, many[j] + sum);
        out((16 + 9 * j) % N, rest + turned);
        out((32 + 9 * j) % N, rest - turned);
    }
}

struct Grid {
    long batch, volume[3], size[3], tiles[3], channels;  // axes D, H, W

    Grid(long batch, long depth, long height, long width, long channels)
        : batch(batch), volume{depth, height, width}, channels(channels) {
        for (int axis = 0; axis < 3; ++axis) {
            size[axis] = (volume[axis] + 3) / 4;
            tiles[axis] = (size[axis] + OUT - 1) / OUT;
        }
    }
    long of_sample() const { return tiles[0] * tiles[1] * tiles[2]; }
    long pairs_of_sample() const { return (of_sample() + 1) / 2; }
    long pairs() const { return batch * pairs_of_sample(); }
    long voxels() const { return volume[0] * volume[1] * volume[2]; }
};

// A tile's sample and its first place along each axis.
struct Tile {
    long sample, first[3];
};

// One or two tiles, of the same sample: rounding errors, and NaNs, go from one to the other. None behind the last pair.
std::vector<Tile> tiles_of(const Grid& grid, long pair) {
    std::vector<Tile> found;
    if (pair >= grid.pairs()) return found;
    long sample = pair / grid.pairs_of_sample(), start = pair % grid.pairs_of_sample() * 2;
    for (long i = start; i < std::min(start + 2, grid.of_sample()); ++i) {
        long w = i % grid.tiles[2], h = i / grid.tiles[2] % grid.tiles[1], d = i / grid.tiles[2] / grid.tiles[1];
        found.push_back({sample, {OUT * d, OUT * h, OUT * w}});
    }
    return found;
}

// values[N, SLOTS] = the phases of the places from `g` on along W; whether any of them lies in the grid
bool read_row(const Grid& grid, const float* volume, const long* g, float* values) {
    const long *size = grid.volume, steps[] = {size[1] * size[2], size[2]};
    if (g[0] < 0 || g[0] >= grid.size[0] || g[1] < 0 || g[1] >= grid.size[1]) return false;
    const float* row = volume + 4 * (g[0] * steps[0] + g[1] * steps[1]);
    long along_d = std::min(4L, size[0] - 4 * g[0]), along_h = std::min(4L, size[1] - 4 * g[1]);
    for (long w = std::max(0L, -g[2]); w < std::min<long>(N, grid.size[2] - g[2]); ++w) {
        const float* here = row + 4 * (g[2] + w);
        float* to = values + w * SLOTS;
        std::copy_n(here, std::min(4L, size[2] - 4 * (g[2] + w)), to);
        for (long i = 1; i < along_h; ++i) to[3 + i] = here[i * steps[1]];
        for (long i = 1; i < along_d; ++i) to[6 + i] = here[i * steps[0]];
        to[PHASES - 1] = 1;
    }
    return true;
}

// The spectra along W of row (d, h) of a pair of tiles: line[N, VECTORS]; false if they are 0.
bool forwards_row(const Grid& grid, const float* volume, const std::vector<Tile>& tiles, long d, long h,
                  Complex* line) {
    float values[2][N * SLOTS] = {};
    bool seen = false;
    for (size_t i = 0; i < tiles.size(); ++i) {
        const long* first = tiles[i].first;
        long g[] = {first[0] + d - BEFORE, first[1] + h - BEFORE, first[2] - BEFORE};
        seen |= read_row(grid, volume + tiles[i].sample * grid.voxels(), g, values[i]);
    }
    if (!seen) return false;
    for (int v = 0; v < VECTORS; ++v)
        transform<false>([&](int n) { return Complex{load(&values[0][n * SLOTS + v * LANES]),
                                                     load(&values[1][n * SLOTS + v * LANES])}; },
                         [&](int k, Complex x) { line[k * VECTORS + v] = x; });
    return true;
}

// A pair of tiles -> its spectra, [N * PLANE, pairs, 2, SLOTS] with those of other pairs; frequencies in order W, H, D.
void forwards(const Grid& grid, const float* volume, long pair, Complex* buffer, float* spectra, long pairs) {
    std::vector<Tile> tiles = tiles_of(grid, pair);
    for (long d = 0; d < N; ++d) {
        Complex* plane = buffer + d * STRIDE * VECTORS;
        bool seen = false;
        for (long h = 0; h < N; ++h) {
            Complex* line = plane + h * N * VECTORS;
            if (forwards_row(grid, volume, tiles, d, h, line)) seen = true;
            else std::fill_n(line, N * VECTORS, Complex{});
        }
        for (long i = 0; i < N * VECTORS && seen; ++i)
            transform<false>([&](int n) { return plane[n * N * VECTORS + i]; },
                             [&](int k, Complex x) { plane[k * N * VECTORS + i] = x; });
    }
    for (long i = 0; i < PLANE * VECTORS; ++i) {
        long w = i / VECTORS / N, h = i / VECTORS % N, v = i % VECTORS;
        float* to = spectra + (w * PLANE + h * N) * pairs * 2 * SLOTS + v * LANES;
        transform<false>([&](int n) { return buffer[(n * STRIDE + h * N + w) * VECTORS + v]; },
                         [&](int k, Complex x) {
                             *(lanes*)(to + k * pairs * 2 * SLOTS) = x.re;
                             *(lanes*)(to + k * pairs * 2 * SLOTS + SLOTS) = x.im;
                         });
    }
}

inline bool kept(int k) { return BEFORE <= k && k < BEFORE + OUT; }

// Products of one line of spectra with weights [N, PHASES, 2, LANES], for TOGETHER pairs and LANES channels, and back
// along D: planes[.., OUT, N] of places (D) and frequencies (H), a plane a pair. `x` are the spectra at the weights'
// frequencies; of BOTH, `mirror` are those at the negative ones, where the weights are the conjugate, and their planes
// are behind the first TOGETHER.
template <bool BOTH, class W>
void multiply_line(const float* x, const float* mirror, long pairs, const W* weight, long h, Complex* planes) {
    Complex line[2][TOGETHER][N];
    for (long d = 0; d < N; ++d) {
        const float *here = x + d * pairs * 2 * SLOTS, *there = mirror + (N - d) % N * pairs * 2 * SLOTS;
        Complex sums[TOGETHER] = {}, others[TOGETHER] = {};
        for (long k = 0; k < PHASES; ++k, weight += 2 * LANES) {
            __builtin_prefetch(weight + AHEAD);
            __builtin_prefetch(weight + AHEAD + LANES);
            lanes re = load(weight), im = load(weight + LANES);
            #pragma GCC unroll 8
            for (int i = 0; i < TOGETHER; ++i) {
                float left = here[i * 2 * SLOTS + k], right = here[(i * 2 + 1) * SLOTS + k];
                sums[i].re += left * re;
                sums[i].im += left * im;
                sums[i].re -= right * im;
                sums[i].im += right * re;
                if (!BOTH) continue;
                left = there[i * 2 * SLOTS + k], right = there[(i * 2 + 1) * SLOTS + k];
                others[i].re += left * re;
                others[i].im -= left * im;
                others[i].re += right * im;
                others[i].im += right * re;
            }
        }
        #pragma GCC unroll 8
        for (int i = 0; i < TOGETHER; ++i) {
            line[0][i][d] = sums[i];
            if (BOTH) line[1][i][(N - d) % N] = others[i];
        }
    }
    for (int side = 0; side < 1 + BOTH; ++side)
        for (int i = 0; i < TOGETHER; ++i) {
            Complex* to = planes + (side * TOGETHER + i) * OUT * N + (side ? (N - h) % N : h);
            transform<true>([&](int n) { return line[side][i][n]; },
                            [&](int k, Complex y) { if (kept(k)) to[(k - BEFORE) * N] = y; });
        }
}

// Complex numbers in the result's type: those that a thread leaves to others are many.
template <class T>
struct alignas(sizeof(T) * LANES) Stored {
    T re[LANES], im[LANES];
};

// Back along H: one pair's plane [OUT, N] -> fields[OUT, OUT] of places (D, H), those kept.
template <class T>
void backwards(const Complex* plane, Stored<T>* fields) {
    for (long d = 0; d < OUT; ++d)
        transform<true>([&](int n) { return plane[d * N + n]; },
                        [&](int k, Complex x) {
                            if (!kept(k)) return;
                            Stored<T>& to = fields[d * OUT + k - BEFORE];
                            store(to.re, x.re);
                            store(to.im, x.im);
                        });
}

// One plane of weights [N, N, PHASES, 2, LANES] and, of BOTH, its mirror image, for TOGETHER pairs from `pair` on:
// spectra [N, PLANE, pairs, 2, SLOTS] -> fields [pairs, N, FIELD].
template <bool BOTH, class T>
void multiply_plane(const float* spectra, long pairs, const T* weights, long fw, long pair, Complex* planes,
                    Stored<T>* fields) {
    for (long h = 0; h < N; ++h)
        multiply_line<BOTH>(spectra + ((fw * N + h) * N * pairs + pair) * 2 * SLOTS,
                            spectra + (((N - fw) % N * N + (N - h) % N) * N * pairs + pair) * 2 * SLOTS, pairs,
                            weights + h * N * PHASES * 2 * LANES, h, planes);
    for (long i = 0; i < TOGETHER; ++i) {
        backwards(planes + i * OUT * N, fields + ((pair + i) * N + fw) * FIELD);
        if (BOTH) backwards(planes + (TOGETHER + i) * OUT * N, fields + ((pair + i) * N + N - fw) * FIELD);
    }
}

// Back along W: the lines of one or two tiles at (d, h) in them, fields[N], FIELD apart -> LANES channels of y.
template <class T>
void finish(const Grid& grid, const Stored<T>* fields, const std::vector<Tile>& tiles, long d, long h, T* y) {
    Complex line[OUT];
    transform<true>([&](int n) { return Complex{load(fields[n * FIELD].re), load(fields[n * FIELD].im)}; },
                    [&](int k, Complex x) { if (kept(k)) line[k - BEFORE] = x; });
    for (size_t i = 0; i < tiles.size(); ++i) {
        const Tile& tile = tiles[i];
        long gd = tile.first[0] + d, gh = tile.first[1] + h, gw = tile.first[2];
        if (gd >= grid.size[0] || gh >= grid.size[1]) continue;
        long place = ((tile.sample * grid.size[0] + gd) * grid.size[1] + gh) * grid.size[2] + gw;
        for (long w = 0; w < std::min<long>(OUT, grid.size[2] - gw); ++w)
            store(y + (place + w) * grid.channels, i ? line[w].im : line[w].re);
    }
}

template <class T>
void convolve(const Grid& grid, const float* volume, const T* weights, T* y, int threads) {
    // Those that are worked on together: each thread has one to transform, and few stay in the third-level cache.
    long pairs = round_up(std::min<long>(threads, grid.pairs()), TOGETHER), parts = grid.channels / LANES;
    std::unique_ptr<Complex[]> memory(new Complex[N * PLANE * pairs * SLOTS / LANES]);
    std::unique_ptr<Stored<T>[]> fields(new Stored<T>[parts * pairs * N * FIELD]);
    float* spectra = (float*)memory.get();
    #pragma omp parallel num_threads(threads)
    {
        std::vector<Complex> buffer(N * STRIDE * SLOTS / LANES);
        for (long start = 0; start < grid.pairs(); start += pairs) {
            #pragma omp for schedule(dynamic)
            for (long pair = 0; pair < pairs; ++pair)
                forwards(grid, volume, start + pair, buffer.data(), &spectra[pair * 2 * SLOTS], pairs);
            #pragma omp for schedule(dynamic)
            for (long i = 0; i < HALF * parts; ++i) {
                long fw = i / parts, part = i % parts;
                const T* plane = weights + (part * HALF + fw) * PLANE * PHASES * 2 * LANES;
                Stored<T>* to = &fields[part * pairs * N * FIELD];
                for (long pair = 0; pair < pairs; pair += TOGETHER) {
                    if (fw % (N / 2) == 0)  // its own mirror image
                        multiply_plane<false>(spectra, pairs, plane, fw, pair, buffer.data(), to);
                    else multiply_plane<true>(spectra, pairs, plane, fw, pair, buffer.data(), to);
                }
            }
            #pragma omp for schedule(static)
            for (long i = 0; i < pairs * OUT; ++i) {
                long pair = i / OUT, d = i % OUT;
                std::vector<Tile> tiles = tiles_of(grid, start + pair);
                for (long h = 0; h < OUT; ++h)
                    for (long part = 0; part < parts; ++part)
                        finish(grid, &fields[(part * pairs + pair) * N * FIELD + d * OUT + h], tiles, d, h,
                               y + part * LANES);
            }
        }
    }
}

}  // namespace

extern "C" {

// volume [batch, depth, height, width] -> y [batch, (depth + 3) / 4, .., .., channels], without the corrections at the
// grid's borders. weights [channels / LANES, HALF, N, N, PHASES, 2, LANES] in y's type, frequencies in order W, H, D.
void fourier_convolve(bool half, const float* volume, const void* weights, void* y, long batch, long depth,
                      long height, long width, long channels, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        convolve(Grid(batch, depth, height, width, channels), volume, (const T*)weights, (T*)y, threads);
    });
}

long fourier_lanes() { return LANES; }
}
