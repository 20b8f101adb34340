/* A register of elements at a time, by GCC's and clang's vector extension: one source for every
 * instruction set. The compilers' own vectorisation of 16-bit loops is half as fast, and vectors
 * wider than the registers go through the stack. */
#ifndef OZ_CPU_VECTORS_H
#define OZ_CPU_VECTORS_H

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "types.h"

#ifdef __AVX512F__
#define OZ_LANES 16
#else
#define OZ_LANES 8
#endif

namespace {

constexpr int64_t LANES = OZ_LANES;
typedef float floats __attribute__((vector_size(4 * OZ_LANES)));
typedef int32_t ints __attribute__((vector_size(4 * OZ_LANES)));
typedef uint32_t words __attribute__((vector_size(4 * OZ_LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * OZ_LANES)));

/* One instruction each, where GCC 12 makes six of the portable conversions of integers. */
#if defined(__AVX512F__)
constexpr __mmask16 ALL = 0xffff; /* keeps GCC from warning about its own header */
inline words widened(halves h) { return (words)_mm512_maskz_cvtepu16_epi32(ALL, (__m256i)h); }
inline halves narrowed(words w) { return (halves)_mm512_maskz_cvtepi32_epi16(ALL, (__m512i)w); }
inline floats f16_values(halves h) { return (floats)_mm512_maskz_cvtph_ps(ALL, (__m256i)h); }
inline halves f16_nearest(floats v) {
  return (halves)_mm512_maskz_cvtps_ph(ALL, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
inline int sign_bits(ints v) { return _mm512_movepi32_mask((__m512i)v); }
inline floats root_of(floats v) { return (floats)_mm512_maskz_sqrt_ps(ALL, (__m512)v); }
#elif defined(__AVX2__)
inline words widened(halves h) { return (words)_mm256_cvtepu16_epi32((__m128i)h); }
inline halves narrowed(words w) { /* of words below 2^16 */
  const __m256i v = (__m256i)w;
  return (halves)_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
inline floats f16_values(halves h) { return (floats)_mm256_cvtph_ps((__m128i)h); }
inline halves f16_nearest(floats v) {
  return (halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
inline int sign_bits(ints v) { return _mm256_movemask_ps((__m256)v); }
inline floats root_of(floats v) { return (floats)_mm256_sqrt_ps((__m256)v); }
#else
inline words widened(halves h) { return __builtin_convertvector(h, words); }
inline halves narrowed(words w) { return __builtin_convertvector(w, halves); }
#ifdef OZ_NEON
inline floats f16_values(halves h) {
  const auto v = same_bits<float16x4x2_t>(h);
  const float32x4x2_t values = {{vcvt_f32_f16(v.val[0]), vcvt_f32_f16(v.val[1])}};
  return same_bits<floats>(values);
}
inline halves f16_nearest(floats v) {
  const auto values = same_bits<float32x4x2_t>(v);
  return same_bits<halves>(vcvt_high_f16_f32(vcvt_f16_f32(values.val[0]), values.val[1]));
}
#else
inline floats f16_values(halves h) { return f16_value_by_bits<floats>(widened(h)); }
inline halves f16_nearest(floats v) { return narrowed(f16_bits_by_bits<words>(v)); }
#endif
inline int sign_bits(ints v) {
  int bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= (v[i] < 0) << i;
  return bits;
}
inline floats root_of(floats v) {
  for (int i = 0; i < LANES; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
#endif

template <int TYPE>
inline floats get(const typename Element<TYPE>::raw *x) {
  if constexpr (TYPE == OZ_F32) {
    floats v;
    std::memcpy(&v, x, sizeof v);
    return v;
  } else if constexpr (TYPE == OZ_BF16) {
    halves h;
    std::memcpy(&h, x, sizeof h);
    return (floats)(widened(h) << 16);
  } else {
    halves h;
    std::memcpy(&h, x, sizeof h);
    return f16_values(h);
  }
}

template <int TYPE>
inline void put(typename Element<TYPE>::raw *x, floats v) {
  if constexpr (TYPE == OZ_F32) {
    std::memcpy(x, &v, sizeof v);
  } else if constexpr (TYPE == OZ_BF16) {
    const words u = (words)v;
    const words nearest = u + 0x7fffu + ((u >> 16) & 1u);
    const words quiet = u | 0x400000u; /* v != v: a NaN stays one. Infinity does as it is. */
    const words chosen = (v == v) ? nearest : quiet;
    const halves h = narrowed(chosen >> 16);
    std::memcpy(x, &h, sizeof h);
  } else {
    const halves h = f16_nearest(v);
    std::memcpy(x, &h, sizeof h);
  }
}

inline float total(floats v) {
  typedef float eight __attribute__((vector_size(32)));
  typedef float four __attribute__((vector_size(16)));
  eight e[OZ_LANES / 8];
  std::memcpy(e, &v, sizeof v);
  const eight sum = OZ_LANES == 16 ? e[0] + e[OZ_LANES / 8 - 1] : e[0];
  four f[2];
  std::memcpy(f, &sum, 32);
  const four g = f[0] + f[1];
  return (g[0] + g[1]) + (g[2] + g[3]);
}

/* A row as it is. */
template <int TYPE>
struct Values {
  const typename Element<TYPE>::raw *x;

  floats lanes(int64_t i) const { return get<TYPE>(x + i); }
  float one(int64_t i) const { return Element<TYPE>::get(x[i]); }
};

/* The sum of the squares of a row. */
template <typename Row>
inline float sum_of_row(Row x, int64_t n) {
  floats sums[4] = {};
  int64_t i = 0;
  const auto lanes = [&](int64_t k, floats &sum) {
    const floats v = x.lanes(k);
    sum += v * v;
  };
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int64_t k = 0; k < 4; ++k) lanes(i + k * LANES, sums[k]);
  for (; i + LANES <= n; i += LANES) lanes(i, sums[0]);
  float rest = 0.0f;
  for (; i < n; ++i) rest += x.one(i) * x.one(i);
  return total((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

template <int TYPE>
inline float sum_of_squares(const typename Element<TYPE>::raw *x, int64_t n) {
  return sum_of_row(Values<TYPE>{x}, n);
}

/* A step of p along size x, which keeps so much of p: of all, or, with a negative decay, which is
 * cautious, of what is not moved away from zero. For one element and for a register of them. */
struct Decoupled {
  float keep;

  template <typename Size, typename F>
  F operator()(F p, Size size, F x) const {
    return keep * p - size * x;
  }
};

struct Cautious {
  float keep;

  template <typename Size, typename F>
  F operator()(F p, Size size, F x) const {
    const F u = size * x;
    return (u * p >= F{} ? F{} + keep : F{} + 1.0f) * p - u;
  }
};

/* run(step), compiled once for each of the two. */
template <typename Run>
inline auto with_decay(float lr, float decay, Run run) {
  return decay < 0 ? run(Cautious{1.0f + lr * decay}) : run(Decoupled{1.0f - lr * decay});
}

/* p[i] = p[i] - lr (by x[i] + decay p[i]) */
template <int TYPE, typename Row>
inline void subtract_row(typename Element<TYPE>::raw *p, Row x, int64_t n, float lr, float by,
                         float decay) {
  using P = Element<TYPE>;
  const float size = lr * by;
  with_decay(lr, decay, [&](auto step) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
      put<TYPE>(p + i, step(get<TYPE>(p + i), size, x.lanes(i)));
    for (; i < n; ++i) p[i] = P::make(step(P::get(p[i]), size, x.one(i)));
  });
}

template <int TYPE, int XTYPE>
inline void subtract(typename Element<TYPE>::raw *p, const typename Element<XTYPE>::raw *x,
                     int64_t n, float lr, float by, float decay) {
  subtract_row<TYPE>(p, Values<XTYPE>{x}, n, lr, by, decay);
}

/* As subtract_row, with a factor by[i] an element. */
template <int TYPE, typename Row>
inline void subtract_each(typename Element<TYPE>::raw *p, Row x, int64_t n, float lr,
                          const float *by, float decay) {
  using P = Element<TYPE>;
  with_decay(lr, decay, [&](auto step) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
      put<TYPE>(p + i, step(get<TYPE>(p + i), lr * get<OZ_F32>(by + i), x.lanes(i)));
    for (; i < n; ++i) p[i] = P::make(step(P::get(p[i]), lr * by[i], x.one(i)));
  });
}

/* A row of the momentum, m[i] = m[i] + rest (sign g[i] - m[i]), as it is stored. */
template <int TYPE>
struct Averages {
  typename Element<TYPE>::raw *m;
  const typename Element<TYPE>::raw *g;
  float sign, rest;

  floats lanes(int64_t i) const {
    const floats old = get<TYPE>(m + i);
    put<TYPE>(m + i, old + rest * (sign * get<TYPE>(g + i) - old));
    return get<TYPE>(m + i);
  }
  float one(int64_t i) const {
    const float old = Element<TYPE>::get(m[i]);
    m[i] = Element<TYPE>::make(old + rest * (sign * Element<TYPE>::get(g[i]) - old));
    return Element<TYPE>::get(m[i]);
  }
};

/* What Nesterov's momentum looks ahead to once a row of it has taken the gradient in. */
template <int TYPE>
struct Ahead {
  const typename Element<TYPE>::raw *m, *g;
  float sign, rest;

  floats lanes(int64_t i) const {
    const floats mean = get<TYPE>(m + i);
    return mean + rest * (sign * get<TYPE>(g + i) - mean);
  }
  float one(int64_t i) const {
    const float mean = Element<TYPE>::get(m[i]);
    return mean + rest * (sign * Element<TYPE>::get(g[i]) - mean);
  }
};

/* The same of a row that takes the gradient in. */
template <int TYPE>
struct AveragesAhead {
  Averages<TYPE> averages;
  Ahead<TYPE> ahead;

  floats lanes(int64_t i) const { return averages.lanes(i), ahead.lanes(i); }
  float one(int64_t i) const { return averages.one(i), ahead.one(i); }
};

/* p[i] = p[i] - lr (by x[i] + decay p[i]), and the sum of the squares of the next row: so the
 * memory's streams flow as evenly as those of a step without a norm. */
template <int TYPE, typename Row, typename Next>
inline float subtract_and_sum(typename Element<TYPE>::raw *p, Row x, int64_t n, float lr, float by,
                              float decay, Next next) {
  using P = Element<TYPE>;
  const float size = lr * by;
  return with_decay(lr, decay, [&](auto step) {
    floats sums[4] = {};
    int64_t i = 0;
    const auto lanes = [&](int64_t k, floats &sum) {
      const floats v = next.lanes(k);
      sum += v * v;
      put<TYPE>(p + k, step(get<TYPE>(p + k), size, x.lanes(k)));
    };
    for (; i + 4 * LANES <= n; i += 4 * LANES)
      for (int64_t k = 0; k < 4; ++k) lanes(i + k * LANES, sums[k]);
    for (; i + LANES <= n; i += LANES) lanes(i, sums[0]);
    float rest = 0.0f;
    for (; i < n; ++i) {
      const float v = next.one(i);
      rest += v * v;
      p[i] = P::make(step(P::get(p[i]), size, x.one(i)));
    }
    return total((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
  });
}

/* m[i] = m[i] + rest (sign g[i] - m[i]) */
template <int TYPE, int GTYPE>
inline void average(typename Element<TYPE>::raw *m, const typename Element<GTYPE>::raw *g,
                    int64_t n, float sign, float rest) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const floats old = get<TYPE>(m + i);
    put<TYPE>(m + i, old + rest * (sign * get<GTYPE>(g + i) - old));
  }
  for (; i < n; ++i) {
    const float old = Element<TYPE>::get(m[i]);
    m[i] = Element<TYPE>::make(old + rest * (sign * Element<GTYPE>::get(g[i]) - old));
  }
}

/* sums[i] = sums[i] + x[i]^2 */
template <typename Row>
inline void add_squares(float *sums, Row x, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const floats v = x.lanes(i);
    put<OZ_F32>(sums + i, get<OZ_F32>(sums + i) + v * v);
  }
  for (; i < n; ++i) sums[i] += x.one(i) * x.one(i);
}

/* bfloat16 from `from[0, n)`, elements [at, at + n) of a tensor, a register at a time; returns how
 * many it did. Elements whose indices differ in their upper half are left. */
inline int64_t bf16_stochastic(const float *from, char *place, int64_t at, int64_t n, uint32_t key) {
  const uint64_t first = static_cast<uint64_t>(at), last = first + static_cast<uint64_t>(n);
  if (high(first) != high(last)) return 0;
  const uint32_t inner = hashed(high(first) ^ key);
  words element = words{} + low(first);
  for (int i = 0; i < LANES; ++i) element[i] += i;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES, element += LANES) {
    const words u = (words)get<OZ_F32>(from + i), random = hashed(element ^ inner);
    const words special = u | ((u & 0xffffu) != 0 ? words{} + 0x400000u : words{});
    const words chosen = (u & 0x7f800000u) != 0x7f800000u ? u + (random & 0xffffu) : special;
    const halves h = narrowed(chosen >> 16);
    std::memcpy(place + 2 * i, &h, sizeof h);
  }
  return i;
}

inline void store_stochastic(const float *from, void *to, int64_t at, int64_t n, int type,
                             uint32_t key) {
  if (type == OZ_F32) return;
  char *place = static_cast<char *>(to) + 2 * at;
  for (int64_t i = type == OZ_BF16 ? bf16_stochastic(from, place, at, n, key) : 0; i < n; ++i) {
    uint32_t random = random_bits(static_cast<uint64_t>(at + i), key);
    if (type == OZ_BF16) {
      uint16_t half = bf16_stochastic(from[i], random);
      std::memcpy(place + 2 * i, &half, 2);
    } else {
      uint16_t half = f16_nearest(f16_stochastic(from[i], random));
      std::memcpy(place + 2 * i, &half, 2);
    }
  }
}

}  // namespace

#endif
