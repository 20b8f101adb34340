/* SWAN's row statistics: see optimzoo.h. */
#include <cmath>

#include "work.h"

OZ_FUNCTION(center) {
  const oz_options &o = *options;
  const float sign = scalars_of(o).sign, eps = static_cast<float>(o.eps);
  if (scalars_of(o).skip) return 0;
#pragma omp parallel num_threads(threads_of(o))
  {
    alignas(64) float a[BLOCK], b[BLOCK];
    deal(
        tensors, count, omp_get_thread_num(), omp_get_num_threads(),
        [](const oz_tensor &t) { return t.rows; }, [](const oz_tensor &t) { return t.cols; },
        [&](int64_t i, int64_t from, int64_t to) {
          const oz_tensor &t = tensors[i];
          const uint32_t key = rounding_key(o, i);
          for (int64_t row = from; row < to; ++row) {
            const int64_t begin = row * t.cols, end = begin + t.cols;
            double sum = 0.0, squares = 0.0;
            for (int64_t at = begin; at < end; at += BLOCK) {
              const int64_t n = std::min(BLOCK, end - at);
              const float *g = load(t.grad, at, n, t.grad_type, a);
              float part = 0.0f;
#pragma omp simd reduction(+ : part)
              for (int64_t j = 0; j < n; ++j) part += g[j];
              sum += part;
            }
            const float mean = static_cast<float>(sum / t.cols);
            for (int64_t at = begin; at < end; at += BLOCK) {
              const int64_t n = std::min(BLOCK, end - at);
              const float *g = load(t.grad, at, n, t.grad_type, a);
              float part = 0.0f;
#pragma omp simd reduction(+ : part)
              for (int64_t j = 0; j < n; ++j) part += (g[j] - mean) * (g[j] - mean);
              squares += part;
            }
            const float size = std::fabs(sign);
            const float deviation = size * static_cast<float>(std::sqrt(squares / t.cols));
            const float by = sign / (deviation < eps ? eps : deviation);
            for (int64_t at = begin; at < end; at += BLOCK) {
              const int64_t n = std::min(BLOCK, end - at);
              const float *g = load(t.grad, at, n, t.grad_type, a);
              float *p = target(t.param, at, t.param_type, b);
              for (int64_t j = 0; j < n; ++j) p[j] = by * (g[j] - mean);
              put(p, t, at, n, o, key);
            }
          }
        });
  }
  return 0;
}
