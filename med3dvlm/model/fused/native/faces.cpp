// Corrections of the outermost planes of the stem's grid: `med3dvlm.model.fused.fourier.Face`.
#include "arithmetic.h"

namespace {

constexpr long COLUMNS = 20, MARGIN = 2;

struct Face {
    long batch, rows, columns;                   // of places
    long from_batch, from_row, from_column;      // distances in the source
    long to_batch, to_row, to_column;            // and in the result
};

// The columns of place g, in the order of `stem.columns`: seven voxels along W, six along H, six along D, and 1.
void read_columns(const float* volume, const long* size, const long* g, float* to) {
    long step = 1, at = 0;
    for (int axis = 2; axis >= 0; step *= size[axis--]) at += 4 * g[axis] * step;
    step = 1;
    for (int axis = 2; axis >= 0; step *= size[axis--])
        for (long tap = -3; tap <= 3; ++tap) {
            long along = 4 * g[axis] + tap;
            if (tap != 0 || axis == 2) *to++ = along >= 0 && along < size[axis] ? volume[at + tap * step] : 0;
        }
    *to = 1;
}

// The columns of the two planes next to a side, and zeros around: to[batch, rows + 2 MARGIN, columns + 2 MARGIN, 2, COLUMNS]
void read_planes(const float* volume, const long* size, int axis, bool high, long batch, float* to, int threads) {
    int row_axis = axis == 0 ? 1 : 0, column_axis = axis == 2 ? 1 : 2;
    auto places = [&](int of) { return (size[of] + 3) / 4; };
    long rows = places(row_axis) + 2 * MARGIN, columns = places(column_axis) + 2 * MARGIN, last = places(axis) - 1;
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < batch * rows; ++i)
        for (long column = 0; column < columns; ++column)
            for (long plane = 0; plane < 2; ++plane) {
                long g[3], row = i % rows;
                g[axis] = high ? last - plane : plane, g[row_axis] = row - MARGIN, g[column_axis] = column - MARGIN;
                bool inside = plane <= last && row >= MARGIN && row < rows - MARGIN && column >= MARGIN &&
                              column < columns - MARGIN;
                float* here = to + ((i * columns + column) * 2 + plane) * COLUMNS;
                if (inside) read_columns(volume + i / rows * size[0] * size[1] * size[2], size, g, here);
                else std::fill_n(here, COLUMNS, 0.f);
            }
}

template <class T>
void add(const Face& face, const float* source, const long* offsets, const float* weights, T* y, long k, long n,
         int threads) {
    long places = face.batch * face.rows * face.columns;
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> seen(BLOCK * k), sums(BLOCK * n);
        std::vector<long> to(BLOCK);
        #pragma omp for schedule(static)
        for (long start = 0; start < places; start += BLOCK) {
            long count = std::min<long>(BLOCK, places - start);
            for (long m = 0; m < count; ++m) {
                long column = (start + m) % face.columns, row = (start + m) / face.columns % face.rows;
                long batch = (start + m) / face.columns / face.rows;
                const float* from = source + batch * face.from_batch + row * face.from_row + column * face.from_column;
                for (long i = 0; i < k; ++i) seen[m * k + i] = from[offsets[i]];
                to[m] = batch * face.to_batch + row * face.to_row + column * face.to_column;
            }
            product(seen.data(), k, 1, weights, n, sums.data(), n, round_up(count, TALL), n, k, false);
            for (long m = 0; m < count; ++m) put_row(&sums[m * n], n, y + to[m], true);
        }
    }
}

}  // namespace

extern "C" {

// volume [batch, depth, height, width] -> what two planes next to a side perpendicular to an axis (0 D, 1 H, 2 W) see
void faces_columns(bool, const float* volume, float* to, long batch, long depth, long height, long width, long axis,
                   bool high, long threads) {
    long size[] = {depth, height, width};
    read_planes(volume, size, axis, high, batch, to, threads);
}

// y[place, n] += sum over i of source[place + offsets[i]] * weights[i, n] for the places of one plane.
void faces_add(bool half, const float* source, const long* offsets, const float* weights, void* y, long k, long n,
               long batch, long rows, long columns, long from_batch, long from_row, long from_column, long to_batch,
               long to_row, long to_column, long threads) {
    Face face{batch, rows, columns, from_batch, from_row, from_column, to_batch, to_row, to_column};
    with_storage(half, [&](auto storage) {
        add(face, source, offsets, weights, (decltype(storage)*)y, k, n, threads);
    });
}
}
