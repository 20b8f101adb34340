/* Adam on a block of elements; SCALE's vectors use it too. */
#ifndef OZ_CPU_ADAM_BLOCK_H
#define OZ_CPU_ADAM_BLOCK_H

#include <cmath>
#include <limits>

#include "vectors.h"
#include "work.h"

namespace {

struct AdamRule {
  float sign, lr, decay, rest1, rest2, eps, correction1, correction2, fade, pull, limit;
};

inline AdamRule adam_rule(const oz_tensor &t, const oz_options &o, const Scalars &s, bool before) {
  const double step = t.step ? *t.step : 1.0;
  const double c1 = 1.0 - std::pow(o.beta1, step), c2 = 1.0 - std::pow(o.beta2, step);
  AdamRule r;
  r.sign = s.sign;
  r.lr = lr_of(t);
  r.decay = t.weight_decay;
  r.rest1 = static_cast<float>(1.0 - o.beta1);
  r.rest2 = static_cast<float>(1.0 - o.beta2);
  r.eps = static_cast<float>(o.adam_eps);
  r.correction1 = static_cast<float>(o.direction ? 1.0 : before ? std::sqrt(c2) / c1 : 1.0 / c1);
  r.correction2 = static_cast<float>(o.direction || before ? 1.0 : 1.0 / std::sqrt(c2));
  r.fade = static_cast<float>(1.0 - o.alpha);
  r.pull = static_cast<float>(o.alpha * o.l1);
  r.limit = o.max_update > 0 ? static_cast<float>(o.max_update)
                             : std::numeric_limits<float>::infinity();
  return r;
}

/* What differs between calls, decided outside of the loops. */
enum Variant { STEP, DIRECTION, MASKED };

/* The same arithmetic for one element (float, with `kept` a bool) and for a register of them. */
template <Variant VARIANT, typename F, typename Kept, typename Root>
inline F adam_element(F p, F g, F &m, F &v, Kept kept, const AdamRule &r, Root root) {
  m += r.rest1 * (r.sign * g - m);
  F moved = m, square = r.sign * g;
  if constexpr (VARIANT == MASKED) {
    const F zero = p - p;
    const F toward = p > zero ? zero + r.pull : (p < zero ? zero - r.pull : zero);
    moved = kept ? m : r.fade * m + toward;
    square = moved;
  }
  v += r.rest2 * (square * square - v);
  F update = r.correction1 * moved / (root(v) * r.correction2 + r.eps);
  const F limit = F{} + r.limit;
  update = update > limit ? limit : (update < -limit ? -limit : update);  /* NaN stays NaN */
  if constexpr (VARIANT == DIRECTION) return update;
  const F all = F{} + std::fabs(r.decay);  /* a negative decay is cautious */
  const F decay = r.decay < 0 ? (update * p >= F{} ? all : F{}) : all;
  return p - r.lr * (update + decay * p);
}

/* All ones in the lanes whose bit is set, from the bit of element i. */
inline ints kept_lanes(const uint8_t *mask, int64_t i) {
#if OZ_LANES == 16
  constexpr ints BITS = {1,       1 << 1,  1 << 2,  1 << 3,  1 << 4,  1 << 5,  1 << 6,  1 << 7,
                         1 << 8,  1 << 9,  1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
  return ((ints{} + (mask[i >> 3] | mask[(i >> 3) + 1] << 8)) & BITS) != 0;
#else
  constexpr ints BITS = {1, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7};
  return ((ints{} + mask[i >> 3]) & BITS) != 0;
#endif
}

/* Elements [0, n); `mask` begins with the bit of the first. */
template <Variant VARIANT, int TYPE, int STATE>
inline void adam_loop(typename Element<TYPE>::raw *p, const typename Element<TYPE>::raw *g,
                      typename Element<STATE>::raw *m, typename Element<STATE>::raw *v,
                      const uint8_t *mask, int64_t n, const AdamRule &r) {
  using P = Element<TYPE>;
  using S = Element<STATE>;
  const auto root = [](float x) { return std::sqrt(x); };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    floats mean = get<STATE>(m + i), square = get<STATE>(v + i);
    const floats weight = VARIANT == DIRECTION ? floats{} : get<TYPE>(p + i);
    ints kept = {};
    if constexpr (VARIANT == MASKED) kept = kept_lanes(mask, i);
    const auto roots = [](floats x) { return root_of(x); };
    put<TYPE>(p + i, adam_element<VARIANT>(weight, get<TYPE>(g + i), mean, square, kept, r, roots));
    put<STATE>(m + i, mean);
    put<STATE>(v + i, square);
  }
  for (; i < n; ++i) {
    float mean = S::get(m[i]), square = S::get(v[i]);
    const bool kept = VARIANT == MASKED && (mask[i >> 3] >> (i & 7)) & 1;
    const float weight = VARIANT == DIRECTION ? 0.0f : P::get(p[i]);
    p[i] = P::make(adam_element<VARIANT>(weight, P::get(g[i]), mean, square, kept, r, root));
    m[i] = S::make(mean);
    v[i] = S::make(square);
  }
}

template <int TYPE, int STATE>
inline void adam_plain(const oz_tensor &t, int64_t at, int64_t n, const AdamRule &r,
                       const oz_options &o) {
  using raw = typename Element<TYPE>::raw;
  using kept = typename Element<STATE>::raw;
  raw *p = static_cast<raw *>(t.param) + at;
  const raw *g = static_cast<const raw *>(t.grad) + at;
  kept *m = static_cast<kept *>(t.exp_avg) + at, *v = static_cast<kept *>(t.exp_avg_sq) + at;
  if (o.direction)
    adam_loop<DIRECTION, TYPE, STATE>(p, g, m, v, nullptr, n, r);
  else if (t.mask)
    adam_loop<MASKED, TYPE, STATE>(p, g, m, v, t.mask + at / 8, n, r);
  else
    adam_loop<STEP, TYPE, STATE>(p, g, m, v, nullptr, n, r);
}

/* By way of float buffers: other mixes of types, stochastic rounding, clipping. */
inline void adam_mixed(const oz_tensor &t, int64_t at, int64_t n, AdamRule r, const oz_options &o,
                       uint32_t key, const float *clip) {
  float gs[BLOCK], ms[BLOCK], vs[BLOCK], ps[BLOCK];
  const auto fill = [&](const void *from, int type, float *buffer) {
    const float *source = load(from, at, n, type, buffer);
    if (source != buffer) std::memcpy(buffer, source, n * sizeof(float));
  };
  fill(t.grad, t.grad_type, gs);
  fill(t.exp_avg, t.state_type, ms);
  fill(t.exp_avg_sq, t.state_type, vs);
  if (!o.direction) fill(t.param, t.param_type, ps);
  if (clip) {
    const float bound = clip[0], ratio = clip[1], by = clip[2];
    for (int64_t i = 0; i < n; ++i) {
      const float x = r.sign * gs[i];
      gs[i] = by * (bound > 0 && std::fabs(x) > bound ? ratio * x : x);
    }
    r.sign = 1.0f;
  }
  oz_tensor buffers = t;
  buffers.param = ps;
  buffers.grad = gs;
  buffers.exp_avg = ms;
  buffers.exp_avg_sq = vs;
  buffers.mask = t.mask ? t.mask + at / 8 : nullptr;
  adam_plain<OZ_F32, OZ_F32>(buffers, 0, n, r, o);
  const auto drain = [&](const float *buffer, void *to, int type) {
    float *place = target(to, at, type, nullptr);
    if (place) std::memcpy(place, buffer, n * sizeof(float));
    store(buffer, to, at, n, type);
  };
  drain(ms, t.exp_avg, t.state_type);
  drain(vs, t.exp_avg_sq, t.state_type);
  if (t.param_type == OZ_F32)
    drain(ps, t.param, OZ_F32);
  else
    put(ps, t, at, n, o, key);
}

/* Elements [at, at + n) of tensor t; n <= BLOCK, and `at` is a multiple of it. */
inline void adam_block(const oz_tensor &t, int64_t at, int64_t n, const AdamRule &r,
                       const oz_options &o, uint32_t key, const float *clip) {
  const bool plain = !clip && o.rounding == OZ_NEAREST && t.grad_type == t.param_type;
  if (plain && t.param_type == OZ_F32 && t.state_type == OZ_F32)
    adam_plain<OZ_F32, OZ_F32>(t, at, n, r, o);
  else if (plain && t.param_type == OZ_BF16 && t.state_type == OZ_BF16)
    adam_plain<OZ_BF16, OZ_BF16>(t, at, n, r, o);
  else if (plain && t.param_type == OZ_BF16 && t.state_type == OZ_F32)
    adam_plain<OZ_BF16, OZ_F32>(t, at, n, r, o);
  else
    adam_mixed(t, at, n, r, o, key, clip);
}

}  // namespace

#endif
