/* Adam on eight elements a thread; SCALE's vectors use it too. */
#ifndef OZ_CUDA_ADAM_CUH
#define OZ_CUDA_ADAM_CUH

#include "table.cuh"

/* What a tensor's step count makes of the options: u = mean by / (sqrt(square) with + eps). */
struct Correction {
  float by, with;
};

/* 1 - beta^t. */
OZ_DEVICE float bias(float log_beta, float t) { return -expm1f(t * log_beta); }

OZ_DEVICE Correction correction_of(const Slot &t, const Rule &r, bool before) {
  if (r.direction) return {1.0f, 1.0f};
  const float c1 = bias(r.log_beta1, *t.step), c2 = bias(r.log_beta2, *t.step);
  if (before) return {sqrtf(c2) / c1, 1.0f};
  return {1.0f / c1, 1.0f / sqrtf(c2)};
}

/* c(g) times the whole tensor's factor; extra = bound, ratio, factor. */
OZ_DEVICE float clipped(float g, const float *extra) {
  const float bound = extra[0];
  return extra[2] * (bound > 0.0f && fabsf(g) > bound ? extra[1] * g : g);
}

OZ_DEVICE void adam_unit(const Slot &t, const Rule &r, const Correction &c, uint32_t unit) {
  const Scalars s = scalars_of(t, r);
  const int64_t at = first_element(unit);
  const int64_t count = t.rows * t.cols - at;
  if (count <= 0) return;
  const Eight raw_g = load(t.grad, at, count, t.grad_type, t.wide);
  const Eight raw_m = load(t.exp_avg, at, count, t.state_type, t.wide);
  const Eight raw_v = load(t.exp_avg_sq, at, count, t.state_type, t.wide);
  Eight raw_p = {};
  if (!r.direction || t.mask) raw_p = load(t.param, at, count, t.param_type, t.wide);
  const uint32_t kept = t.mask ? t.mask[at / EIGHT] : 0xffu;
  float g[EIGHT], m[EIGHT], v[EIGHT], p[EIGHT];
  unpack(raw_g, t.grad_type, g);
  unpack(raw_m, t.state_type, m);
  unpack(raw_v, t.state_type, v);
  unpack(raw_p, t.param_type, p);
#pragma unroll
  for (int i = 0; i < EIGHT; ++i) {
    float x = s.sign * g[i];
    if (t.extra) x = clipped(x, t.extra);
    m[i] = fmaf(r.rest1, x - m[i], m[i]);
    float mean = m[i];
    if (t.mask) {
      x = mean;
      if (!(kept >> i & 1u)) {
        const float pull = p[i] > 0.0f ? r.pull : p[i] < 0.0f ? -r.pull : 0.0f;
        x = mean = fmaf(1.0f - r.alpha, mean, pull);
      }
    }
    v[i] = fmaf(r.rest2, fmaf(x, x, -v[i]), v[i]);
    float u = __fdividef(c.by * mean, fmaf(sqrtf(v[i]), c.with, r.adam_eps));
    u = u > r.limit ? r.limit : u < -r.limit ? -r.limit : u;  // NaN stays NaN
    p[i] = r.direction ? u : fmaf(-s.lr, fmaf(decay_at(t.decay, p[i], u), p[i], u), p[i]);
  }
  store(t.exp_avg, at, count, t.state_type, t.wide, m);
  store(t.exp_avg_sq, at, count, t.state_type, t.wide, v);
  round_results(p, t.param_type, t, r, at);
  store(t.param, at, count, t.param_type, t.wide, p);
}

#endif
