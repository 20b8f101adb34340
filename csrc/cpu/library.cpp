/* The library's entry points: each takes the build for the best instruction set of this machine,
 * or the one that OPTIMZOO_CPU_ISA names (baseline, avx2, avx512), if the machine has it. */
#include <cstdlib>
#include <cstring>

#pragma GCC visibility push(default)
#include "optimzoo.h"
#pragma GCC visibility pop

#define OZ_DECLARE(op)                                             \
  int op##_baseline(const oz_tensor *, int64_t, const oz_options *); \
  int op##_avx2(const oz_tensor *, int64_t, const oz_options *);     \
  int op##_avx512(const oz_tensor *, int64_t, const oz_options *);

OZ_DECLARE(scale)
OZ_DECLARE(adam)
OZ_DECLARE(reduce)
OZ_DECLARE(apply)
OZ_DECLARE(center)
OZ_DECLARE(sinkhorn)

#define OZ_DECLARE_HISTORY(set)                                                                     \
  int history_dot_##set(const void *, const void *, float *, int64_t, int64_t, int, int);          \
  int history_combine_##set(const void *, const float *, float *, int64_t, int64_t, int, int);

OZ_DECLARE_HISTORY(baseline)
OZ_DECLARE_HISTORY(avx2)
OZ_DECLARE_HISTORY(avx512)

#define OZ_DECLARE_MASK(set)                                                                  \
  int nm_mask_##set(const void *, uint8_t *, int64_t, int64_t, int, int, int, int);

OZ_DECLARE_MASK(baseline)
OZ_DECLARE_MASK(avx2)
OZ_DECLARE_MASK(avx512)

namespace {

int best_isa() {
#ifdef OZ_X86
  int best = 0;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
  if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    best = 2;
  return best;
#else
  return 0;
#endif
}

const char *const names[] = {"baseline", "avx2", "avx512"};

int chosen_isa() {
  const char *asked = std::getenv("OPTIMZOO_CPU_ISA");
  int best = best_isa();
  for (int i = 0; asked && i < best; ++i)
    if (!std::strcmp(asked, names[i])) return i;
  return best;
}

const int isa = chosen_isa();

}  // namespace

#ifdef OZ_X86
#define OZ_CHOOSE(op, ...)                                             \
  isa == 2   ? op##_avx512(__VA_ARGS__)                                \
  : isa == 1 ? op##_avx2(__VA_ARGS__)                                  \
             : op##_baseline(__VA_ARGS__)
#else
#define OZ_CHOOSE(op, ...) op##_baseline(__VA_ARGS__)
#endif

#define OZ_EXPORT(op)                                                              \
  int oz_cpu_##op(const oz_tensor *tensors, int64_t count, const oz_options *options, \
                  void *) {                                                        \
    return OZ_CHOOSE(op, tensors, count, options);                                                          \
  }

extern "C" {
int oz_cpu_abi(void) { return OZ_ABI; }
int oz_cpu_threaded(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}
__attribute__((visibility("default"))) const char *oz_cpu_isa(void) { return names[isa]; }
OZ_EXPORT(scale)
OZ_EXPORT(adam)
OZ_EXPORT(reduce)
OZ_EXPORT(apply)
OZ_EXPORT(center)
OZ_EXPORT(sinkhorn)

int oz_cpu_history_dot(const void *history, const void *vector, float *out, int64_t rows,
                       int64_t cols, int32_t type, int32_t threads) {
  return OZ_CHOOSE(history_dot, history, vector, out, rows, cols, type, threads);
}

int oz_cpu_history_combine(const void *history, const float *weights, float *out, int64_t rows,
                           int64_t cols, int32_t type, int32_t threads) {
  return OZ_CHOOSE(history_combine, history, weights, out, rows, cols, type, threads);
}

int oz_cpu_nm_mask(const void *weight, uint8_t *mask, int64_t rows, int64_t cols, int32_t type,
                   int32_t n, int32_t m, int32_t threads) {
  return OZ_CHOOSE(nm_mask, weight, mask, rows, cols, type, n, m, threads);
}
}
