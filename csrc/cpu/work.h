/* What the operations share: the options read once, and a call's work dealt to threads.
 *
 * Why no two threads race (ThreadSanitizer cannot tell: libgomp's barriers are not built for it). deal()
 * cuts the units of all tensors into contiguous shares, so a unit has one thread, and a thread writes
 * only what belongs to its units: their elements of param and moments, which are disjoint ranges of
 * memory (rows, or blocks of a multiple of eight elements, so that packed masks are read by byte and
 * written by row); their entries of `partial` sums (reduce, sinkhorn), or a row of sums of its own
 * (scale, history). What others have written is read behind a barrier alone: factors by the second
 * pass of scale, sums and factors by turns in sinkhorn, sums after the parallel region of reduce,
 * under `critical` in history. Options, tables and gradients are only read. */
#ifndef OZ_CPU_WORK_H
#define OZ_CPU_WORK_H

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>

#include "vectors.h"

/* Each operation is compiled once for each instruction set, under a name of its own. */
#define OZ_PASTE(a, b) a##_##b
#define OZ_NAME(a, b) OZ_PASTE(a, b)
#define OZ_FUNCTION(op) \
  int OZ_NAME(op, OZ_ISA)(const oz_tensor *tensors, int64_t count, const oz_options *options)

namespace {

#ifndef _OPENMP /* the compiler has none: what is written for threads runs in one */
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
inline int omp_get_max_threads() { return 1; }
#endif

constexpr int64_t BLOCK = 4096; /* elements: three float buffers of it stay in the L2 cache */

struct Scalars {
  bool skip;
  float sign; /* of a gradient, and its scale */
};

inline Scalars scalars_of(const oz_options &o) {
  float scale = o.grad_scale ? 1.0f / *o.grad_scale : 1.0f;
  return {o.found_inf && *o.found_inf != 0.0f, o.maximize ? -scale : scale};
}

inline float lr_of(const oz_tensor &t) { return t.lr_tensor ? *t.lr_tensor : t.lr; }

inline int threads_of(const oz_options &o) {
  return std::max(1, o.threads > 0 ? o.threads : omp_get_max_threads());
}

/* Deal the units of all tensors out: thread `me` of `of` gets a contiguous share, by elements.
 * `units(t)` says how many units tensor t has and `size(t)` how many elements one has; `run(i, from,
 * to)` is called for each tensor's part. */
template <typename Units, typename Size, typename Run>
inline void deal(const oz_tensor *tensors, int64_t count, int me, int of, Units units, Size size,
                 Run run) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += units(tensors[i]) * size(tensors[i]);
  auto cut = [&](int part) {
    return static_cast<int64_t>(static_cast<__int128>(total) * part / of);
  };
  int64_t first = cut(me), last = cut(me + 1), done = 0;
  for (int64_t i = 0; i < count && done < last; ++i) {
    int64_t each = size(tensors[i]), n = units(tensors[i]);
    if (n == 0 || each == 0) continue;
    /* A unit belongs to the thread in whose share its first element lies. */
    auto begins = [&](int64_t at) {
      return std::clamp((at - done + each - 1) / each, int64_t{0}, n);
    };
    int64_t from = first <= done ? 0 : begins(first), to = begins(last);
    if (from < to) run(i, from, to);
    done += n * each;
  }
}

inline int64_t blocks_of(const oz_tensor &t) { return (t.rows * t.cols + BLOCK - 1) / BLOCK; }

OZ_APART void put(const float *from, const oz_tensor &t, int64_t at, int64_t n,
                  const oz_options &o, uint32_t key) {
  if (o.rounding == OZ_STOCHASTIC)
    store_stochastic(from, t.param, at, n, t.param_type, key);
  else
    store(from, t.param, at, n, t.param_type);
}

}  // namespace

#endif
