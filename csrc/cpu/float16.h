/* float16 to float32 and back, to nearest (ties to even): the one place that knows how. Memory holds
 * float16 as its bits, because no type of it is known to all compilers. Every way below gives the same
 * bits, those of the instructions: a NaN stays one and keeps its sign and the upper bits of its
 * payload. */
#ifndef OZ_CPU_FLOAT16_H
#define OZ_CPU_FLOAT16_H

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#define OZ_NEON 1
#endif

namespace {

template <typename To, typename From>
inline To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

/* By integers and one addition, of a word or of a register of them: F is of floats, W of uint32_t. */
template <typename F, typename W>
inline F f16_value_by_bits(W half) {
  const W size = half & 0x7fffu, shifted = size << 13;
  const W zero = half - half;
  /* Below 2^-14: 2^-14 (1 + m / 1024) - 2^-14, which is exact. */
  const F offset = same_bits<F>(zero + (113u << 23));
  const W subnormal = same_bits<W>(same_bits<F>(shifted + (113u << 23)) - offset);
  const W infinite = shifted | 0x7f800000u, nan = infinite | 0x400000u;
  const W special = size > 0x7c00u ? nan : infinite;
  const W number = size < 0x0400u ? subnormal : shifted + (112u << 23);
  return same_bits<F>((size < 0x7c00u ? number : special) | (half & 0x8000u) << 16);
}

template <typename W, typename F>
inline W f16_bits_by_bits(F x) {
  const W u = same_bits<W>(x), size = u & 0x7fffffffu, zero = u - u;
  const W rounded = ((size + 0xfffu + ((size >> 13) & 1u)) >> 13) - (112u << 10);
  /* Below 2^-14: floats from 1/2 to 1 are 2^-24 apart, as these numbers are. */
  const W half = zero + (126u << 23);
  const W subnormal = same_bits<W>(same_bits<F>(size) + same_bits<F>(half)) - half;
  const W nan = ((size >> 13) & 0x3ffu) | 0x7e00u;
  const W special = size > 0x7f800000u ? nan : zero + 0x7c00u; /* from 65520 on: infinity */
  const W number = size < 0x38800000u ? subnormal : rounded;
  return (size < 0x477ff000u ? number : special) | ((u >> 16) & 0x8000u);
}

#if defined(__F16C__)
inline float f16_value(uint16_t half) { return _cvtsh_ss(half); }
inline uint16_t f16_nearest(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(OZ_NEON)
inline float f16_value(uint16_t half) { return static_cast<float>(same_bits<__fp16>(half)); }
inline uint16_t f16_nearest(float x) { return same_bits<uint16_t>(static_cast<__fp16>(x)); }
#else
inline float f16_value(uint16_t half) { return f16_value_by_bits<float, uint32_t>(half); }
inline uint16_t f16_nearest(float x) {
  return static_cast<uint16_t>(f16_bits_by_bits<uint32_t, float>(x));
}
#endif

}  // namespace

#endif
