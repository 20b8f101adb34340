/* Adam on a block of elements; SCALE's vectors use it too. */
#ifndef OZ_CPU_ADAM_BLOCK_H
#define OZ_CPU_ADAM_BLOCK_H

#include <cmath>

#include "work.h"

namespace {

struct AdamRule {
  float sign, lr, decay, rest1, rest2, eps, correction1, correction2, alpha, pull;
  bool before, direction;
};

inline AdamRule adam_rule(const oz_options &o, const Scalars &s, const float *step, bool before) {
  double t = step ? *step : 1.0;
  double c1 = 1.0 - std::pow(o.beta1, t), c2 = 1.0 - std::pow(o.beta2, t);
  AdamRule r;
  r.sign = s.sign;
  r.lr = s.lr;
  r.decay = static_cast<float>(o.weight_decay);
  r.rest1 = static_cast<float>(1.0 - o.beta1);
  r.rest2 = static_cast<float>(1.0 - o.beta2);
  r.eps = static_cast<float>(o.adam_eps);
  r.before = before;
  r.direction = o.direction;
  r.correction1 = static_cast<float>(r.direction ? 1.0 : before ? std::sqrt(c2) / c1 : 1.0 / c1);
  r.correction2 = static_cast<float>(r.direction || before ? 1.0 : 1.0 / std::sqrt(c2));
  r.alpha = static_cast<float>(o.alpha);
  r.pull = static_cast<float>(o.alpha * o.l1);
  return r;
}

/* Elements [at, at + n) of tensor t, n <= BLOCK. */
inline void adam_block(const oz_tensor &t, int64_t at, int64_t n, const AdamRule &r,
                       const oz_options &o, uint32_t key, const float *clip) {
  alignas(64) float gs[BLOCK], ms[BLOCK], vs[BLOCK], ps[BLOCK];
  const float *g = load(t.grad, at, n, t.grad_type, gs);
  const float *m0 = load(t.exp_avg, at, n, t.state_type, ms);
  const float *v0 = load(t.exp_avg_sq, at, n, t.state_type, vs);
  float *m = target(t.exp_avg, at, t.state_type, ms);
  float *v = target(t.exp_avg_sq, at, t.state_type, vs);
  float *p = target(t.param, at, t.param_type, ps);
  const float *p0 = r.direction ? g : load(t.param, at, n, t.param_type, ps);
  if (clip) {
    float bound = clip[0], ratio = clip[1], factor = clip[2];
    for (int64_t i = 0; i < n; ++i) {
      float x = r.sign * g[i];
      gs[i] = factor * (bound > 0 && std::fabs(x) > bound ? ratio * x : x);
    }
    g = gs;
  }
  const float sign = clip ? 1.0f : r.sign;
  if (t.mask) {
    for (int64_t i = 0; i < n; ++i) {
      int64_t e = at + i;
      bool kept = (t.mask[e >> 3] >> (e & 7)) & 1;
      float mean = m0[i] + r.rest1 * (sign * g[i] - m0[i]);
      float toward = p0[i] > 0 ? r.pull : p0[i] < 0 ? -r.pull : 0.0f;
      float mt = kept ? mean : (1.0f - r.alpha) * mean + toward;
      float square = v0[i] + r.rest2 * (mt * mt - v0[i]);
      float update = r.correction1 * mt / (std::sqrt(square) * r.correction2 + r.eps);
      m[i] = mean;
      v[i] = square;
      p[i] = r.direction ? update : p0[i] - r.lr * (update + r.decay * p0[i]);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      float x = sign * g[i];
      float mean = m0[i] + r.rest1 * (x - m0[i]);
      float square = v0[i] + r.rest2 * (x * x - v0[i]);
      float update = r.correction1 * mean / (std::sqrt(square) * r.correction2 + r.eps);
      m[i] = mean;
      v[i] = square;
      p[i] = r.direction ? update : p0[i] - r.lr * (update + r.decay * p0[i]);
    }
  }
  store(m, t.exp_avg, at, n, t.state_type);
  store(v, t.exp_avg_sq, at, n, t.state_type);
  put(p, t, at, n, o, key);
}

}  // namespace

#endif
