/* The two passes over Natural GaLore's history, a matrix [rows, cols] with few rows: see optimzoo.h. A
 * thread takes a share of the columns, so that both use the whole bandwidth. */
#include <vector>

#include "vectors.h"
#include "work.h"

namespace {

template <int TYPE>
void dot(const void *from, const void *along, float *out, int64_t rows, int64_t cols,
         [[maybe_unused]] int threads) {
  using raw = typename Element<TYPE>::raw;
  const raw *history = static_cast<const raw *>(from), *vector = static_cast<const raw *>(along);
  std::vector<double> sums(rows, 0.0);
  const int64_t blocks = (cols + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads)
  {
    std::vector<double> mine(rows, 0.0);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * BLOCK, n = std::min(BLOCK, cols - at);
      const raw *g = vector + at;
      for (int64_t row = 0; row < rows; ++row) {
        const raw *h = history + row * cols + at;
        floats sum[4] = {};
        int64_t i = 0;
        for (; i + 4 * LANES <= n; i += 4 * LANES)
          for (int64_t k = 0; k < 4; ++k)
            sum[k] += get<TYPE>(h + i + k * LANES) * get<TYPE>(g + i + k * LANES);
        float rest = 0.0f;
        for (; i < n; ++i) rest += Element<TYPE>::get(h[i]) * Element<TYPE>::get(g[i]);
        mine[row] += total((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
      }
    }
#pragma omp critical
    for (int64_t row = 0; row < rows; ++row) sums[row] += mine[row];
  }
  for (int64_t row = 0; row < rows; ++row) out[row] = static_cast<float>(sums[row]);
}

template <int TYPE>
void combine(const void *from, const float *weights, float *out, int64_t rows, int64_t cols,
             [[maybe_unused]] int threads) {
  using raw = typename Element<TYPE>::raw;
  const raw *history = static_cast<const raw *>(from);
  constexpr int64_t PART = 1024;
  const int64_t parts = (cols + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t b = 0; b < parts; ++b) {
    const int64_t at = b * PART, n = std::min(PART, cols - at);
    float sum[PART] = {};
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) { /* four at a time: a sum is stored once for all four */
      const raw *h = history + row * cols + at, *h1 = h + cols, *h2 = h1 + cols, *h3 = h2 + cols;
      const float *w = weights + row;
      int64_t i = 0;
      for (; i + LANES <= n; i += LANES)
        put<OZ_F32>(sum + i, get<OZ_F32>(sum + i) + w[0] * get<TYPE>(h + i) +
                                 w[1] * get<TYPE>(h1 + i) + w[2] * get<TYPE>(h2 + i) +
                                 w[3] * get<TYPE>(h3 + i));
      for (; i < n; ++i)
        sum[i] += w[0] * Element<TYPE>::get(h[i]) + w[1] * Element<TYPE>::get(h1[i]) +
                  w[2] * Element<TYPE>::get(h2[i]) + w[3] * Element<TYPE>::get(h3[i]);
    }
    for (; row < rows; ++row) {
      const raw *h = history + row * cols + at;
      for (int64_t i = 0; i < n; ++i) sum[i] += weights[row] * Element<TYPE>::get(h[i]);
    }
    std::memcpy(out + at, sum, n * sizeof(float));
  }
}

}  // namespace

int OZ_NAME(history_dot, OZ_ISA)(const void *history, const void *vector, float *out, int64_t rows,
                                 int64_t cols, int type, int threads) {
  if (type == OZ_F32)
    dot<OZ_F32>(history, vector, out, rows, cols, threads);
  else
    dot<OZ_BF16>(history, vector, out, rows, cols, threads);
  return 0;
}

int OZ_NAME(history_combine, OZ_ISA)(const void *history, const float *weights, float *out,
                                     int64_t rows, int64_t cols, int type, int threads) {
  if (type == OZ_F32)
    combine<OZ_F32>(history, weights, out, rows, cols, threads);
  else
    combine<OZ_BF16>(history, weights, out, rows, cols, threads);
  return 0;
}
