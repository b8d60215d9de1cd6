// Max pooling over 3 x 3 x 3 places, stride 2, of which one before each border does not count. A NaN makes a NaN.
// Channels are a multiple of LANES.
#include "arithmetic.h"

namespace {

inline lanes larger(lanes a, lanes b) { return (a > b) | (a != a) ? a : b; }

template <class T>
void pool(const T* x, T* y, long batch, long depth, long height, long width, long n, int threads) {
    long deep = (depth + 1) / 2, high = (height + 1) / 2, wide = (width + 1) / 2;
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> maxima(width * n);
        #pragma omp for schedule(static)
        for (long i = 0; i < batch * deep * high; ++i) {
            long b = i / high / deep, d = 2 * (i / high % deep), h = 2 * (i % high);
            const T* rows[9];
            int count = 0;
            for (long p = std::max(0L, d - 1); p < std::min(depth, d + 2); ++p)
                for (long q = std::max(0L, h - 1); q < std::min(height, h + 2); ++q)
                    rows[count++] = x + ((b * depth + p) * height + q) * width * n;
            for (long c = 0; c < width * n; c += LANES) {
                lanes most = load(rows[0] + c);
                for (int r = 1; r < count; ++r) most = larger(load(rows[r] + c), most);
                store(most, &maxima[c]);
            }
            for (long w = 0; w < width; w += 2)
                for (long c = 0; c < n; c += LANES) {
                    const float* middle = &maxima[w * n + c];
                    lanes most = load(middle);
                    if (w > 0) most = larger(load(middle - n), most);
                    if (w + 1 < width) most = larger(load(middle + n), most);
                    store(most, y + (i * wide + w / 2) * n + c);
                }
        }
    }
}

}  // namespace

// x [batch, depth, height, width, n] -> y [batch, depth / 2, height / 2, width / 2, n], sizes rounded up
extern "C" void max_pool(bool half, const void* x, void* y, long batch, long depth, long height, long width, long n,
                         long threads) {
    with_storage(half, [&](auto storage) {
        using T = decltype(storage);
        pool((const T*)x, (T*)y, batch, depth, height, width, n, threads);
    });
}
