// The sum of three depth-wise convolutions, along h, w and d, in one pass. Channels are a multiple of LANES.
//
// A thread takes LANES channels of a band of rows, which it first copies: there they are float32 and without gaps, and
// neighbours along h and d do not lie a power of 2 apart, which a cache holds few of.
#include <memory>

#include "arithmetic.h"

namespace {

constexpr int DEEP = 4, BROAD = LANES == 16 ? 4 : 2;  // planes and columns of a tile; its sums fill the registers
constexpr int SPARE = DEEP - 1;                       // zeros around the taps: an input does not reach a whole tile
constexpr long CACHE = 1 << 20;                       // bytes

struct alignas(4 * LANES) Place {
    float channels[LANES];
};

struct Volume {
    long batch, depth, height, width, n;
    long at(long b, long d, long h, long w) const { return (((b * depth + d) * height + h) * width + w) * n; }
};

// A copy of rows first .. last of all planes. Places that fill up tiles are not set: no result depends on them.
struct Piece {
    const Volume& volume;
    long row, plane, first = 0, last = 0;
    std::unique_ptr<Place[]> places;

    Piece(const Volume& volume, long rows)
        : volume(volume), row(round_up(volume.width, BROAD) | 1), plane(rows * row | 1),
          places(new Place[round_up(volume.depth, DEEP) * plane]) {}

    float* at(long d, long h, long w) { return places[d * plane + (h - first) * row + w].channels; }

    template <class T>
    void read(const T* x, long from, long to) {
        first = from, last = to;
        for (long d = 0; d < volume.depth; ++d)
            for (long h = first; h < last; ++h)
                for (long w = 0; w < volume.width; ++w) store(at(d, h, w), load(x + volume.at(0, d, h, w)));
    }
};

// Kernels along h, w and d, zeros around each.
struct Taps {
    long length, row;
    std::vector<Place> places;

    explicit Taps(long length) : length(length), row(length + 2 * SPARE), places(3 * row) {}

    // The tap through which a place sees the one that lies `away` behind it.
    float* at(int axis, long away) { return places[axis * row + SPARE + length / 2 + away].channels; }

    void read(const float* taps, long n) {  // [3, length, n]
        for (int axis = 0; axis < 3; ++axis)
            for (long t = 0; t < length; ++t) store(at(axis, t - length / 2), load(taps + (axis * length + t) * n));
    }
};

// Adds to a tile what it sees of `count` inputs along one axis, `step` apart. `taps` are those of its first place.
template <bool ALONG_D, bool ALONG_W>
inline __attribute__((always_inline)) void add_along(const float* x, long step, long plane, const float* taps,
                                                     long count, lanes (&sums)[DEEP][BROAD]) {
    for (; count > 0; --count, x += step, taps += LANES)
        #pragma GCC unroll 4
        for (int i = 0; i < DEEP; ++i)
            #pragma GCC unroll 4
            for (int j = 0; j < BROAD; ++j)
                sums[i][j] += load(taps - (ALONG_D ? i : ALONG_W ? j : 0) * LANES) *
                              load(x + (ALONG_D ? 0 : i * plane) + (ALONG_W ? 0 : j * LANES));
}

// One tile, whose first place is at (d, h, w); y is that place of the result.
template <class T>
void convolve_tile(Piece& x, Taps& taps, lanes bias, long d, long h, long w, T* y) {
    long half = taps.length / 2, row = x.row * LANES, plane = x.plane * LANES;
    lanes sums[DEEP][BROAD];
    #pragma GCC unroll 4
    for (int i = 0; i < DEEP; ++i)
        #pragma GCC unroll 4
        for (int j = 0; j < BROAD; ++j) sums[i][j] = bias;
    long from = std::max(x.first, h - half), to = std::min(x.last, h + half + 1);
    add_along<false, false>(x.at(d, from, w), row, plane, taps.at(0, from - h), to - from, sums);
    from = std::max(0L, w - half), to = std::min(x.volume.width, w + half + BROAD);
    add_along<false, true>(x.at(d, h, from), LANES, plane, taps.at(1, from - w), to - from, sums);
    from = std::max(0L, d - half), to = std::min(x.volume.depth, d + half + DEEP);
    add_along<true, false>(x.at(from, h, w), plane, plane, taps.at(2, from - d), to - from, sums);
    #pragma GCC unroll 4
    for (int i = 0; i < DEEP; ++i)
        #pragma GCC unroll 4
        for (int j = 0; j < BROAD; ++j)
            if (d + i < x.volume.depth && w + j < x.volume.width) store(y + x.volume.at(0, i, 0, j), sums[i][j]);
}

template <class T>
void convolve(const T* x, const float* taps, const float* bias, T* y, const Volume& volume, long length, int threads) {
    long half = length / 2, chunks = volume.n / LANES, rows = volume.height;
    auto bands = [&] { return (volume.height + rows - 1) / rows; };
    auto seen = [&] { return std::min(rows + 2 * half, volume.height); };
    auto bytes = [&] { return seen() * volume.depth * volume.width * long(sizeof(Place)); };
    while (rows > length && (volume.batch * bands() * chunks < 2 * threads || bytes() > CACHE)) rows = (rows + 1) / 2;
    #pragma omp parallel num_threads(threads)
    {
        Piece piece(volume, seen());
        Taps ours(length);
        #pragma omp for schedule(static)
        for (long i = 0; i < volume.batch * bands() * chunks; ++i) {
            long c = i % chunks * LANES, first = i / chunks % bands() * rows, batch = i / chunks / bands();
            long last = std::min(first + rows, volume.height), start = volume.at(batch, 0, 0, 0) + c;
            piece.read(x + start, std::max(0L, first - half), std::min(last + half, volume.height));
            ours.read(taps + c, volume.n);
            for (long w = 0; w < volume.width; w += BROAD)
                for (long d = 0; d < volume.depth; d += DEEP)
                    for (long h = first; h < last; ++h)
                        convolve_tile(piece, ours, load(bias + c), d, h, w, y + start + volume.at(0, d, h, w));
        }
    }
}

}  // namespace

// y = bias + the convolutions of x along h, w and d. x and y [batch, depth, height, width, n], taps [3, length, n] in
// that order, length odd, bias [n]
extern "C" void depthwise_sum(bool half, const void* x, const float* taps, const float* bias, void* y, long batch,
                              long depth, long height, long width, long n, long length, long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        convolve((const T*)x, taps, bias, (T*)y, {batch, depth, height, width, n}, length, threads);
    });
}
