/* A step along the gradient, scaled by row, by column or as a whole: see optimzoo.h. */
#include "work.h"

namespace {

constexpr int64_t ROWS = 8; /* a unit */

inline int64_t units_of(const oz_tensor &t) { return (t.rows + ROWS - 1) / ROWS; }
inline int64_t size_of(const oz_tensor &t) { return ROWS * t.cols; }

}  // namespace

OZ_FUNCTION(apply) {
  const oz_options &o = *options;
  const Scalars s = scalars_of(o);
  if (s.skip) return 0;
#pragma omp parallel num_threads(threads_of(o))
  {
    alignas(64) float a[BLOCK], b[BLOCK];
    deal(tensors, count, omp_get_thread_num(), omp_get_num_threads(), units_of, size_of,
         [&](int64_t i, int64_t from, int64_t to) {
           const oz_tensor &t = tensors[i];
           const uint32_t key = rounding_key(o, i);
           const float *scales = static_cast<const float *>(t.extra);
           const float lr = lr_of(t), size = lr * s.sign, decay = t.weight_decay;
           for (int64_t row = from * ROWS; row < std::min(t.rows, to * ROWS); ++row)
             for (int64_t col = 0; col < t.cols; col += BLOCK) {
               const int64_t at = row * t.cols + col, n = std::min(BLOCK, t.cols - col);
               const float *g = load(t.grad, at, n, t.grad_type, a);
               const float *p0 = load(t.param, at, n, t.param_type, b);
               float *p = target(t.param, at, t.param_type, b);
               with_decay(lr, decay, [&](auto step) {
                 if (t.kind == OZ_COLUMNS) {
                   const float *by = scales + col;
                   for (int64_t j = 0; j < n; ++j) p[j] = step(p0[j], size * by[j], g[j]);
                 } else {
                   const float by = size * scales[t.kind == OZ_ROWS ? row : 0];
                   for (int64_t j = 0; j < n; ++j) p[j] = step(p0[j], by, g[j]);
                 }
               });
               put(p, t, at, n, o, key);
             }
         });
  }
  return 0;
}
