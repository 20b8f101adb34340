/* Adam, AdamW, AdamS: see optimzoo.h. */
#include "adam_block.h"

OZ_FUNCTION(adam) {
  const oz_options &o = *options;
  const Scalars s = scalars_of(o);
  if (s.skip) return 0;
#pragma omp parallel num_threads(threads_of(o))
  deal(
      tensors, count, omp_get_thread_num(), omp_get_num_threads(), blocks_of,
      [](const oz_tensor &) { return BLOCK; },
      [&](int64_t i, int64_t from, int64_t to) {
        const oz_tensor &t = tensors[i];
        const AdamRule rule = adam_rule(t, o, s, o.eps_before);
        const uint32_t key = rounding_key(o, i);
        const float *clip = static_cast<const float *>(t.extra);
        const int64_t n = t.rows * t.cols;
        for (int64_t b = from; b < to; ++b)
          adam_block(t, b * BLOCK, std::min(BLOCK, n - b * BLOCK), rule, o, key, clip);
      });
  return 0;
}
