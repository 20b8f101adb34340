/* SCALE's arithmetic on one element. */
#ifndef OZ_CUDA_SCALE_RULE_CUH
#define OZ_CUDA_SCALE_RULE_CUH

#include "table.cuh"

/* What takes the place of 1 / s; of a NaN, a NaN. */
OZ_DEVICE float factor(float sum, const Slot &t, const Rule &r) {
  const float square = sum * t.share;
  return square <= r.floor ? r.most : rsqrtf(square);
}

/* p - lr (by x + decay p). CAUTIOUS: the decay may be; the loops that hold all they can in registers
 * have none left for that. */
template <bool CAUTIOUS>
OZ_DEVICE float stepped(float p, float x, float by, const Slot &t, const Scalars &s) {
  const float decay = s.lr * t.decay;
  return fmaf(-s.lr * by, x, fmaf(-(CAUTIOUS ? decay_at(decay, p, by * x) : decay), p, p));
}

OZ_DEVICE float averaged(float m, float g, const Rule &r) { return fmaf(r.rest, g - m, m); }

/* What a step follows of a momentum as it is stored: that or, of Nesterov's, what it looks ahead to. */
OZ_DEVICE float followed(float m, float g, const Rule &r) {
  return r.nesterov ? averaged(m, g, r) : m;
}

OZ_DEVICE float sign_of(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x; }

#endif
