/* The two passes over Natural GaLore's history, a float32 matrix [rows, cols] with few rows: see
 * optimzoo.h. A thread takes a share of the columns, so that both use the whole bandwidth. */
#include <vector>

#include "vectors.h"
#include "work.h"

int OZ_NAME(history_dot, OZ_ISA)(const float *history, const float *vector, float *out, int64_t rows,
                                 int64_t cols, int threads) {
  std::vector<double> sums(rows, 0.0);
  const int64_t blocks = (cols + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads)
  {
    std::vector<double> mine(rows, 0.0);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * BLOCK, n = std::min(BLOCK, cols - at);
      const float *g = vector + at;
      for (int64_t row = 0; row < rows; ++row) {
        const float *h = history + row * cols + at;
        floats a = {}, c = {};
        int64_t i = 0;
        for (; i + 2 * LANES <= n; i += 2 * LANES) {
          a += get<OZ_F32>(h + i) * get<OZ_F32>(g + i);
          c += get<OZ_F32>(h + i + LANES) * get<OZ_F32>(g + i + LANES);
        }
        float rest = 0.0f;
        for (; i < n; ++i) rest += h[i] * g[i];
        mine[row] += total(a + c) + rest;
      }
    }
#pragma omp critical
    for (int64_t row = 0; row < rows; ++row) sums[row] += mine[row];
  }
  for (int64_t row = 0; row < rows; ++row) out[row] = static_cast<float>(sums[row]);
  return 0;
}

int OZ_NAME(history_combine, OZ_ISA)(const float *history, const float *weights, float *out,
                                     int64_t rows, int64_t cols, int threads) {
  constexpr int64_t PART = 1024;
  const int64_t parts = (cols + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < parts; ++b) {
    const int64_t at = b * PART, n = std::min(PART, cols - at);
    float sum[PART] = {};
    for (int64_t row = 0; row < rows; ++row) {
      const float *h = history + row * cols + at;
      const float w = weights[row];
      int64_t i = 0;
      for (; i + LANES <= n; i += LANES)
        put<OZ_F32>(sum + i, get<OZ_F32>(sum + i) + w * get<OZ_F32>(h + i));
      for (; i < n; ++i) sum[i] += w * h[i];
    }
    std::memcpy(out + at, sum, n * sizeof(float));
  }
  return 0;
}
