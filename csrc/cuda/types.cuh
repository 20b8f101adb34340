/* The three element types as float32, and the two ways of rounding back. */
#ifndef OZ_CUDA_TYPES_CUH
#define OZ_CUDA_TYPES_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "optimzoo.h"

#define OZ_BOTH __host__ __device__ __forceinline__
#define OZ_DEVICE __device__ __forceinline__

template <typename To, typename From>
OZ_BOTH To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the bits");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

/* ---- Stochastic rounding, as optimzoo.h has it. ---- */

/* The 32-bit finaliser of MurmurHash3. */
OZ_BOTH uint32_t hashed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

OZ_BOTH uint32_t low(uint64_t x) { return static_cast<uint32_t>(x); }
OZ_BOTH uint32_t high(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

/* A float32 that bfloat16 holds exactly; what is not finite stays. */
OZ_BOTH float stochastic_bf16(float x, uint32_t random) {
  const uint32_t u = bits_as<uint32_t>(x);
  const bool finite = (u & 0x7f800000u) != 0x7f800000u;
  return finite ? bits_as<float>((u + (random & 0xffffu)) & 0xffff0000u) : x;
}

/* Below 2^-14 the numbers of float16 are 2^-24 apart; there size, its fraction and 1 - random 2^-24
 * are exact, so that comparing the last two adds without rounding. */
OZ_BOTH float stochastic_f16(float x, uint32_t random) {
  const uint32_t u = bits_as<uint32_t>(x), magnitude = u & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return x;
  if (magnitude >= 0x38800000u) return bits_as<float>((u + (random & 0x1fffu)) & ~0x1fffu);
  const float size = bits_as<float>(magnitude) * 16777216.0f, whole = floorf(size);
  const float room = static_cast<float>(16777216u - (random >> 8)) / 16777216.0f;
  const float result = (size - whole >= room ? whole + 1.0f : whole) / 16777216.0f;
  return bits_as<float>(bits_as<uint32_t>(result) | (u & 0x80000000u));
}

/* x as `type` is to hold it, if rounding is stochastic: converting it to nearest is then exact. */
OZ_BOTH float stochastic(float x, int type, uint32_t random) {
  return type == OZ_BF16 ? stochastic_bf16(x, random) : stochastic_f16(x, random);
}

/* ---- Sixteen bytes of one type, as floats. ---- */

template <int TYPE>
struct Vector {
  static constexpr int COUNT = TYPE == OZ_F32 ? 4 : 8; /* elements */
};

OZ_DEVICE float from_f16(uint32_t half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
}

template <int TYPE>
OZ_DEVICE void unpack(uint4 v, float *out) {
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (TYPE == OZ_F32) {
      out[i] = bits_as<float>(word[i]);
    } else if constexpr (TYPE == OZ_BF16) {
      out[2 * i] = bits_as<float>(word[i] << 16);
      out[2 * i + 1] = bits_as<float>(word[i] & 0xffff0000u);
    } else {
      out[2 * i] = from_f16(word[i] & 0xffffu);
      out[2 * i + 1] = from_f16(word[i] >> 16);
    }
  }
}

/* To nearest. */
template <int TYPE>
OZ_DEVICE uint4 pack(const float *x) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (TYPE == OZ_F32)
      word[i] = bits_as<uint32_t>(x[i]);
    else if constexpr (TYPE == OZ_BF16)
      word[i] = bits_as<uint32_t>(__floats2bfloat162_rn(x[2 * i], x[2 * i + 1]));
    else
      word[i] = bits_as<uint32_t>(__floats2half2_rn(x[2 * i], x[2 * i + 1]));
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

/* ---- One element of a type known at run time. ---- */

OZ_BOTH int size_of(int type) { return type == OZ_F32 ? 4 : 2; }

OZ_DEVICE float get(const void *from, int64_t at, int type) {
  if (type == OZ_F32) return static_cast<const float *>(from)[at];
  const uint32_t half = static_cast<const uint16_t *>(from)[at];
  return type == OZ_BF16 ? bits_as<float>(half << 16) : from_f16(half);
}

/* To nearest. */
OZ_DEVICE void put(void *to, int64_t at, int type, float x) {
  if (type == OZ_F32)
    static_cast<float *>(to)[at] = x;
  else if (type == OZ_BF16)
    static_cast<uint16_t *>(to)[at] = __bfloat16_as_ushort(__float2bfloat16_rn(x));
  else
    static_cast<uint16_t *>(to)[at] = __half_as_ushort(__float2half_rn(x));
}

/* As memory of that type gives it back. */
OZ_DEVICE float nearest(float x, int type) {
  if (type == OZ_F32) return x;
  return type == OZ_BF16 ? __bfloat162float(__float2bfloat16_rn(x))
                         : __half2float(__float2half_rn(x));
}

/* ---- Eight elements of a type known at run time: raw first, so that loads do not wait for each
 * other's conversion. ---- */

constexpr int EIGHT = 8;

struct Eight {
  uint4 first, second; /* the second for float32 alone */
};

/* Elements [at, at + count); `wide` allows 16-byte accesses. */
OZ_DEVICE Eight load(const void *from, int64_t at, int64_t count, int type, bool wide) {
  Eight x = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
  if (wide && count >= EIGHT) {
    const char *place = static_cast<const char *>(from) + at * size_of(type);
    x.first = reinterpret_cast<const uint4 *>(place)[0];
    if (type == OZ_F32) x.second = reinterpret_cast<const uint4 *>(place)[1];
    return x;
  }
  uint32_t word[EIGHT] = {};
#pragma unroll
  for (int i = 0; i < EIGHT; ++i) {
    if (i >= count) break;
    if (type == OZ_F32)
      word[i] = static_cast<const uint32_t *>(from)[at + i];
    else
      word[i / 2] |= static_cast<uint32_t>(static_cast<const uint16_t *>(from)[at + i])
                     << (16 * (i % 2));
  }
  return {make_uint4(word[0], word[1], word[2], word[3]),
          make_uint4(word[4], word[5], word[6], word[7])};
}

OZ_DEVICE void unpack(const Eight &x, int type, float *out) {
  if (type == OZ_BF16) {
    unpack<OZ_BF16>(x.first, out);
  } else if (type == OZ_F16) {
    unpack<OZ_F16>(x.first, out);
  } else {
    unpack<OZ_F32>(x.first, out);
    unpack<OZ_F32>(x.second, out + 4);
  }
}

/* Elements [at, at + count), to nearest. */
OZ_DEVICE void store(void *to, int64_t at, int64_t count, int type, bool wide, const float *x) {
  if (wide && count >= EIGHT) {
    uint4 *place = reinterpret_cast<uint4 *>(static_cast<char *>(to) + at * size_of(type));
    if (type == OZ_BF16) {
      place[0] = pack<OZ_BF16>(x);
    } else if (type == OZ_F16) {
      place[0] = pack<OZ_F16>(x);
    } else {
      place[0] = pack<OZ_F32>(x);
      place[1] = pack<OZ_F32>(x + 4);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < EIGHT; ++i)
    if (i < count) put(to, at + i, type, x[i]);
}

#endif
