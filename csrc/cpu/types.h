/* Loading and storing the three element types as float32, and the two ways of rounding. */
#ifndef OZ_CPU_TYPES_H
#define OZ_CPU_TYPES_H

#include <cstdint>
#include <cstring>

#include "float16.h"
#include "optimzoo.h"

namespace {

inline uint32_t bits_of(float x) { return same_bits<uint32_t>(x); }

inline float float_of(uint32_t u) { return same_bits<float>(u); }

inline bool is_finite(uint32_t u) { return (u & 0x7f800000u) != 0x7f800000u; }

/* The 32-bit finaliser of MurmurHash3, of a word or of a register of them. */
template <typename W>
inline W hashed(W x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

inline uint32_t low(uint64_t x) { return static_cast<uint32_t>(x); }
inline uint32_t high(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

inline uint32_t rounding_key(const oz_options &o, int64_t tensor) {
  uint32_t index = o.first_index + static_cast<uint32_t>(tensor);
  uint32_t inner = hashed(low(o.step) ^ hashed(high(o.step) ^ hashed(index)));
  return hashed(low(o.seed) ^ hashed(high(o.seed) ^ inner));
}

inline uint32_t random_bits(uint64_t element, uint32_t key) {
  return hashed(low(element) ^ hashed(high(element) ^ key));
}

inline uint16_t bf16_nearest(float x) {
  uint32_t u = bits_of(x);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  uint32_t special = (u >> 16) | ((u & 0xffffu) ? 0x40u : 0u); /* infinity stays, a NaN stays one */
  return static_cast<uint16_t>(is_finite(u) ? rounded : special);
}

inline uint16_t bf16_stochastic(float x, uint32_t random) {
  uint32_t u = bits_of(x);
  return is_finite(u) ? static_cast<uint16_t>((u + (random & 0xffffu)) >> 16) : bf16_nearest(x);
}

inline float f16_stochastic(float x, uint32_t random) {
  uint32_t u = bits_of(x), size = u & 0x7fffffffu;
  if (!is_finite(u)) return x;
  if (size >= 0x38800000u) return float_of((u + (random & 0x1fffu)) & ~0x1fffu);
  /* Below 2^-14 numbers of float16 are 2^-24 apart. float64 holds the sum exactly. */
  double units = static_cast<double>(float_of(size)) * 16777216.0 + (random >> 8) / 16777216.0;
  float magnitude = static_cast<float>(static_cast<int32_t>(units)) / 16777216.0f;
  return float_of(bits_of(magnitude) | (u & 0x80000000u));
}

/* One element type, for loops over memory that all has it. */
template <int TYPE>
struct Element;

template <>
struct Element<OZ_F32> {
  using raw = float;
  static float get(raw x) { return x; }
  static raw make(float x) { return x; }
};

template <>
struct Element<OZ_BF16> {
  using raw = uint16_t;
  static float get(raw x) { return float_of(static_cast<uint32_t>(x) << 16); }
  static raw make(float x) { return bf16_nearest(x); }
};

template <>
struct Element<OZ_F16> {
  using raw = uint16_t;
  static float get(raw x) { return f16_value(x); }
  static raw make(float x) { return f16_nearest(x); }
};

/* For what is called once for a block of elements: inlined it costs the compiler seconds, and the
 * step nothing less. */
#define OZ_APART __attribute__((noinline, unused))

/* `n` elements as floats: the memory itself for float32 at its alignment, else converted into
 * `buffer`. */
OZ_APART const float *load(const void *from, int64_t at, int64_t n, int type, float *buffer) {
  if (type == OZ_F32) {
    const char *source = static_cast<const char *>(from) + 4 * at;
    return reinterpret_cast<const float *>(source);
  }
  const char *source = static_cast<const char *>(from) + 2 * at;
  if (type == OZ_BF16) {
    for (int64_t i = 0; i < n; ++i) {
      uint16_t half;
      std::memcpy(&half, source + 2 * i, 2);
      buffer[i] = float_of(static_cast<uint32_t>(half) << 16);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      uint16_t half;
      std::memcpy(&half, source + 2 * i, 2);
      buffer[i] = f16_value(half);
    }
  }
  return buffer;
}

/* Where `n` results go: the memory itself for float32, else `buffer`, which store() then rounds. */
inline float *target(void *to, int64_t at, int type, float *buffer) {
  return type == OZ_F32 ? reinterpret_cast<float *>(static_cast<char *>(to) + 4 * at) : buffer;
}

OZ_APART void store(const float *from, void *to, int64_t at, int64_t n, int type) {
  if (type == OZ_F32) return;
  char *place = static_cast<char *>(to) + 2 * at;
  if (type == OZ_BF16) {
    for (int64_t i = 0; i < n; ++i) {
      uint16_t half = bf16_nearest(from[i]);
      std::memcpy(place + 2 * i, &half, 2);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      uint16_t half = f16_nearest(from[i]);
      std::memcpy(place + 2 * i, &half, 2);
    }
  }
}

}  // namespace

#endif
