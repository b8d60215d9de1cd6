// Corrections of the outermost planes of the stem's grid: `med3dvlm.model.fused.fourier.Face`.
#include <memory>

#include "arithmetic.h"

namespace {

constexpr long COLUMNS = 20, MARGIN = 2, SEEN = 2;  // SEEN planes next to a side decide on the corrections

// A side of the grid of places, perpendicular to an axis (0 D, 1 H, 2 W). Rows and columns lie along the other axes.
struct Side {
    long batch, volume[3], places[3], axis, row_axis, column_axis;
    bool high;

    Side(long batch, long depth, long height, long width, long axis, bool high)
        : batch(batch), volume{depth, height, width}, axis(axis), row_axis(axis == 0), column_axis(axis == 2 ? 1 : 2),
          high(high) {
        for (int i = 0; i < 3; ++i) places[i] = (volume[i] + 3) / 4;
    }
    long rows() const { return places[row_axis]; }
    long columns() const { return places[column_axis]; }
    long row_length() const { return (columns() + 2 * MARGIN) * SEEN * COLUMNS; }  // of what `read_row` writes
    long length() const { return (rows() + 2 * MARGIN) * row_length(); }

    // g = a place in the plane-th plane, counted from outside
    void find(long plane, long row, long column, long* g) const {
        g[axis] = high ? places[axis] - 1 - plane : plane;
        g[row_axis] = row;
        g[column_axis] = column;
    }
};

// The columns of place g, in the order of `stem.columns`: seven voxels along W, six along H, six along D, and 1.
void read_place(const float* volume, const long* size, const long* g, float* to) {
    long steps[] = {size[1] * size[2], size[2], 1}, at = 0;
    for (int axis = 0; axis < 3; ++axis) at += 4 * g[axis] * steps[axis];
    for (int axis = 2; axis >= 0; --axis)
        for (long tap = -3; tap <= 3; ++tap) {
            long along = 4 * g[axis] + tap;
            if (tap != 0 || axis == 2) *to++ = along >= 0 && along < size[axis] ? volume[at + tap * steps[axis]] : 0;
        }
    *to = 1;
}

// A row of the planes next to a side: to[columns + 2 MARGIN, SEEN, COLUMNS], zeros outside of the grid
void read_row(const Side& side, const float* volume, long row, float* to) {
    std::fill_n(to, side.row_length(), 0.f);
    if (row < 0 || row >= side.rows()) return;
    to += MARGIN * SEEN * COLUMNS;
    for (long column = 0; column < side.columns(); ++column)
        for (long plane = 0; plane < SEEN; ++plane, to += COLUMNS) {
            long g[3];
            side.find(plane, row, column, g);
            if (plane < side.places[side.axis]) read_place(volume, side.volume, g, to);
        }
}

// Numbers that lie together in the source, `from` away from a place.
struct Run {
    long from, length;
};

// y[place, n] += sum over the k numbers in runs of each times weights[k, n], for the places of one plane.
template <class T>
void add(const Side& side, long plane, const float* source, const std::vector<Run>& runs, long k,
         const float* weights, T* y, long n) {
    long area = side.rows() * side.columns();
    std::vector<float> seen(BLOCK * k), sums(BLOCK * n);
    #pragma omp for schedule(static)
    for (long start = 0; start < side.batch * area; start += BLOCK) {
        long count = std::min<long>(BLOCK, side.batch * area - start);
        T* to[BLOCK];
        for (long m = 0; m < count; ++m) {
            long batch = (start + m) / area, row = (start + m) % area / side.columns(), g[3];
            long column = (start + m) % side.columns();
            const float* from =
                source + batch * side.length() + row * side.row_length() + column * SEEN * COLUMNS;
            float* next = &seen[m * k];
            for (const Run& run : runs) next = std::copy_n(from + run.from, run.length, next);
            side.find(plane, row, column, g);
            to[m] = y + (((batch * side.places[0] + g[0]) * side.places[1] + g[1]) * side.places[2] + g[2]) * n;
            for (long c = 0; c < n; c += LANES) __builtin_prefetch(to[m] + c, 1);  // scattered, and needed soon
        }
        product(seen.data(), k, 1, weights, n, sums.data(), n, count, n, k, false);
        for (long m = 0; m < count; ++m)
            for (long c = 0; c < n; c += LANES) store(to[m] + c, load(to[m] + c) + load(&sums[m * n + c]));
    }
}

template <class T>
void correct(const Side& side, const float* volume, const long* where, const long* counts, long planes,
             const float* weights, T* y, long n, int threads) {
    std::unique_ptr<float[]> source(new float[side.batch * side.length()]);
    std::vector<std::vector<Run>> runs(planes);
    for (long plane = 0; plane < planes; ++plane)
        for (long i = 0; i < counts[plane]; ++i, where += 4) {
            long from = where[0] * side.row_length() + (where[1] * SEEN + where[2]) * COLUMNS + where[3];
            std::vector<Run>& found = runs[plane];
            if (found.empty() || found.back().from + found.back().length != from) found.push_back({from, 0});
            ++found.back().length;
        }
    #pragma omp parallel num_threads(threads)
    {
        long rows = side.rows() + 2 * MARGIN, voxels = side.volume[0] * side.volume[1] * side.volume[2];
        #pragma omp for schedule(static)
        for (long i = 0; i < side.batch * rows; ++i)
            read_row(side, volume + i / rows * voxels, i % rows - MARGIN, &source[i * side.row_length()]);
        const float* of_plane = weights;
        for (long plane = 0; plane < std::min(planes, side.places[side.axis]); ++plane) {
            add(side, plane, source.get(), runs[plane], counts[plane], of_plane, y, n);
            of_plane += counts[plane] * n;
        }
    }
}

}  // namespace

extern "C" {

// Corrects the planes of y [batch, places along D, H, W, n] next to a side of a volume [batch, depth, height, width].
// Plane i, counted from outside, depends on the next counts[i] rows of `where`: (row and column relative to a place,
// from -MARGIN on, plane, column of `stem.columns`), with the rows of `weights` [.., n].
void faces_correct(bool half, const float* volume, const long* where, const long* counts, long planes,
                   const float* weights, void* y, long n, long batch, long depth, long height, long width, long axis,
                   bool high, long threads) {
    Side side(batch, depth, height, width, axis, high);
    with_storage(half, [&](auto storage) {
        correct(side, volume, where, counts, planes, weights, (decltype(storage)*)y, n, threads);
    });
}
}
