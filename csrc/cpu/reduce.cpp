/* Sums of squares by row, by column, and over a clipped tensor: see optimzoo.h. Each tensor is
 * summed over fixed blocks, in their order, so the result does not depend on the threads. */
#include <cmath>
#include <vector>

#include "work.h"

namespace {

constexpr int64_t CHUNK = 256; /* rows a unit of OZ_COLUMNS */

inline int64_t units_of(const oz_tensor &t) {
  if (t.kind == OZ_ROWS) return t.rows;
  return t.kind == OZ_COLUMNS ? (t.rows + CHUNK - 1) / CHUNK : blocks_of(t);
}

inline int64_t size_of(const oz_tensor &t) {
  if (t.kind == OZ_ROWS) return t.cols;
  return t.kind == OZ_COLUMNS ? CHUNK * t.cols : BLOCK;
}

/* Floats of scratch for one unit. */
inline int64_t width_of(const oz_tensor &t) {
  if (t.kind == OZ_ROWS) return 0;
  return t.kind == OZ_COLUMNS ? t.cols : 2;
}

inline float squares(const oz_tensor &t, int64_t begin, int64_t end, float sign, float *buffer) {
  float total = 0.0f;
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t n = std::min(BLOCK, end - at);
    const float *g = load(t.grad, at, n, t.grad_type, buffer);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += (sign * g[i]) * (sign * g[i]);
    total += sum;
  }
  return total;
}

inline void clipped(const oz_tensor &t, int64_t at, int64_t n, float sign, float *buffer,
                    float *out) {
  const float *g = load(t.grad, at, n, t.grad_type, buffer);
  const float *extra = static_cast<const float *>(t.extra);
  const float bound = extra[2], ratio = extra[3];
  float most = 0.0f, sum = 0.0f;
#pragma omp simd reduction(+ : sum) reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    const float x = std::fabs(sign * g[i]);
    const float c = bound > 0 && x > bound ? ratio * x : x;
    most = x > most ? x : most;
    sum += c * c;
  }
  out[0] = sum == sum ? most : NAN;
  out[1] = sum;
}

}  // namespace

OZ_FUNCTION(reduce) {
  const oz_options &o = *options;
  const Scalars s = scalars_of(o);
  if (s.skip) return 0;
  const float sign = s.sign;
  std::vector<int64_t> offset(count + 1, 0);
  for (int64_t i = 0; i < count; ++i)
    offset[i + 1] = offset[i] + units_of(tensors[i]) * width_of(tensors[i]);
  std::vector<float> partial(offset[count], 0.0f);
#pragma omp parallel num_threads(threads_of(o))
  {
    alignas(64) float buffer[BLOCK];
    deal(tensors, count, omp_get_thread_num(), omp_get_num_threads(), units_of, size_of,
         [&](int64_t i, int64_t from, int64_t to) {
           const oz_tensor &t = tensors[i];
           float *out = static_cast<float *>(t.extra);
           for (int64_t unit = from; unit < to; ++unit) {
             float *sums = partial.data() + offset[i] + unit * width_of(t);
             if (t.kind == OZ_ROWS) {
               out[unit] = squares(t, unit * t.cols, (unit + 1) * t.cols, sign, buffer);
             } else if (t.kind == OZ_SIGN) {
               const int64_t at = unit * BLOCK;
               clipped(t, at, std::min(BLOCK, t.rows * t.cols - at), sign, buffer, sums);
             } else {
               const int64_t last = std::min(t.rows, (unit + 1) * CHUNK);
               for (int64_t row = unit * CHUNK; row < last; ++row)
                 for (int64_t col = 0; col < t.cols; col += BLOCK) {
                   const int64_t n = std::min(BLOCK, t.cols - col);
                   const float *g = load(t.grad, row * t.cols + col, n, t.grad_type, buffer);
                   for (int64_t j = 0; j < n; ++j)
                     sums[col + j] += (sign * g[j]) * (sign * g[j]);
                 }
             }
           }
         });
  }
  for (int64_t i = 0; i < count; ++i) {
    const oz_tensor &t = tensors[i];
    if (t.kind == OZ_ROWS || t.rows * t.cols == 0) continue;
    float *out = static_cast<float *>(t.extra);
    const float *sums = partial.data() + offset[i];
    const int64_t n = units_of(t);
    if (t.kind == OZ_COLUMNS) {
      for (int64_t j = 0; j < t.cols; ++j) {
        float sum = 0.0f;
        for (int64_t unit = 0; unit < n; ++unit) sum += sums[unit * t.cols + j];
        out[j] = sum;
      }
      continue;
    }
    float most = 0.0f;
    double sum = 0.0;
    for (int64_t unit = 0; unit < n; ++unit) {
      most = sums[2 * unit] > most || sums[2 * unit] != sums[2 * unit] ? sums[2 * unit] : most;
      sum += sums[2 * unit + 1];
    }
    out[0] = most;
    out[1] = static_cast<float>(sum);
  }
  return 0;
}
