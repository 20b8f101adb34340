/* The packed N:M mask of a weight in one pass over it: see optimzoo.h. */
#include "vectors.h"
#include "work.h"

/* The first is clang's, and GCC's from version 12 on; the second GCC's own. */
#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define OZ_SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#endif
#endif
#ifndef OZ_SHUFFLE
#define OZ_SHUFFLE(v, ...) __builtin_shuffle(v, ints{__VA_ARGS__})
#endif

namespace {

/* Lane i of the result is the member of i's group of M that stands `by` places after it. */
template <int M, int BY>
inline ints turned(ints v) {
#define OZ_AT(i) ((i & ~(M - 1)) | ((i + BY) & (M - 1)))
  return OZ_SHUFFLE(v, OZ_AT(0), OZ_AT(1), OZ_AT(2), OZ_AT(3), OZ_AT(4), OZ_AT(5),
                                 OZ_AT(6), OZ_AT(7)
#if OZ_LANES == 16
                                 , OZ_AT(8), OZ_AT(9), OZ_AT(10), OZ_AT(11), OZ_AT(12), OZ_AT(13),
                                 OZ_AT(14), OZ_AT(15)
#endif
  );
#undef OZ_AT
}

/* 1 where that member has a lower index, and so wins where both are equal. */
template <int M, int BY>
inline ints earlier() {
  ints lower;
  for (int i = 0; i < LANES; ++i) lower[i] = ((i + BY) & (M - 1)) < (i & (M - 1));
  return lower;
}

/* Minus the number of members that beat each. */
template <int M, int BY = 1>
inline ints beaten(ints size) {
  ints result = turned<M, BY>(size) + earlier<M, BY>() > size;
  if constexpr (BY + 1 < M) result += beaten<M, BY + 1>(size);
  return result;
}

template <int M>
inline int kept(floats weight, int n) {
  /* The bits of magnitudes are ordered as they are; NaN counts as infinite. */
  ints size = (ints)weight & 0x7fffffff;
  const ints infinite = (ints){} + 0x7f800000;
  size = size > infinite ? infinite : size;
  return sign_bits(beaten<M>(size) > -n ? (ints){} - 1 : (ints){});
}

template <int TYPE, int M>
void rows_of(const void *weight, uint8_t *mask, int64_t from, int64_t to, int64_t cols, int n) {
  typedef typename Element<TYPE>::raw raw;
  const int64_t stride = (cols + 7) / 8;
  for (int64_t row = from; row < to; ++row) {
    const raw *w = static_cast<const raw *>(weight) + row * cols;
    uint8_t *out = mask + row * stride;
    int64_t at = 0;
    for (; at + LANES <= cols; at += LANES) {
      const int bits = kept<M>(get<TYPE>(w + at), n);
      for (int64_t i = 0; i < LANES; i += 8) out[(at + i) / 8] = static_cast<uint8_t>(bits >> i);
    }
    if (at == cols) continue;
    raw rest[LANES] = {};
    std::memcpy(rest, w + at, (cols - at) * sizeof(raw));
    const int bits = kept<M>(get<TYPE>(rest), n) & ((1 << (cols - at)) - 1);
    for (int64_t i = 0; at + i < cols; i += 8) out[(at + i) / 8] = static_cast<uint8_t>(bits >> i);
  }
}

template <int TYPE>
void rows_of(int m, const void *weight, uint8_t *mask, int64_t from, int64_t to, int64_t cols,
             int n) {
  if (m == 2) rows_of<TYPE, 2>(weight, mask, from, to, cols, n);
  if (m == 4) rows_of<TYPE, 4>(weight, mask, from, to, cols, n);
  if (m == 8) rows_of<TYPE, 8>(weight, mask, from, to, cols, n);
}

}  // namespace

int OZ_NAME(nm_mask, OZ_ISA)(const void *weight, uint8_t *mask, int64_t rows, int64_t cols, int type,
                             int n, int m, [[maybe_unused]] int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int me = omp_get_thread_num(), of = omp_get_num_threads();
    const int64_t from = rows * me / of, to = rows * (me + 1) / of;
    if (type == OZ_F32) rows_of<OZ_F32>(m, weight, mask, from, to, cols, n);
    if (type == OZ_BF16) rows_of<OZ_BF16>(m, weight, mask, from, to, cols, n);
    if (type == OZ_F16) rows_of<OZ_F16>(m, weight, mask, from, to, cols, n);
  }
  return 0;
}
