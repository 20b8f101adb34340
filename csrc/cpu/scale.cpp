/* SCALE: see optimzoo.h. Rows, signs and vectors take one pass; columns take two, with the second
 * from the end, where the cache still holds what the first read last. */
#include <cmath>
#include <vector>

#include "adam_block.h"
#include "vectors.h"

namespace {

/* What holds for all tensors. */
struct Rule {
  float sign, rest, eps;
  bool l2, nesterov;
};

/* The factor that takes the place of g / s, from the sum of the squares of g before its scale. */
inline float factor(float sum, int64_t n, const Rule &r, float scale) {
  float length = std::sqrt(r.l2 ? sum : sum / static_cast<float>(n)) * std::fabs(scale);
  return scale / (length < r.eps ? r.eps : length); /* a NaN stays one */
}

/* What is normalised is the gradient, whose sign and scale come with the factor, or the momentum,
 * which has them already. */
inline float scale_of(const oz_tensor &t, const Rule &r) { return t.exp_avg ? 1.0f : r.sign; }

/* ---- Tensors of one type, rounded to nearest: loops over the memory itself. ---- */

template <int TYPE>
struct Plain {
  using raw = typename Element<TYPE>::raw;
  const oz_tensor &t;
  const Rule &r;
  const float lr = lr_of(t), decay = t.weight_decay;

  /* The gradient, or the momentum once it has taken the gradient in. */
  const raw *direction(int64_t at, int64_t n, bool update) const {
    const raw *g = static_cast<const raw *>(t.grad) + at;
    if (!t.exp_avg) return g;
    raw *m = static_cast<raw *>(t.exp_avg) + at;
    if (update) average<TYPE, TYPE>(m, g, n, r.sign, r.rest);
    return m;
  }

  bool looks_ahead() const { return r.nesterov && t.exp_avg; }

  Ahead<TYPE> ahead(int64_t at) const {
    const raw *m = static_cast<const raw *>(t.exp_avg), *g = static_cast<const raw *>(t.grad);
    return {m + at, g + at, r.sign, r.rest};
  }

  float step_and_sum(int64_t row, float by) const {
    const int64_t at = row * t.cols, next = at + t.cols;
    raw *p = static_cast<raw *>(t.param) + at;
    const raw *g = static_cast<const raw *>(t.grad);
    raw *m = static_cast<raw *>(t.exp_avg);
    if (!m)
      return subtract_and_sum<TYPE>(p, Values<TYPE>{g + at}, t.cols, lr, by, decay,
                                    Values<TYPE>{g + next});
    const Averages<TYPE> averages = {m + next, g + next, r.sign, r.rest};
    if (looks_ahead())
      return subtract_and_sum<TYPE>(p, ahead(at), t.cols, lr, by, decay,
                                    AveragesAhead<TYPE>{averages, ahead(next)});
    return subtract_and_sum<TYPE>(p, Values<TYPE>{m + at}, t.cols, lr, by, decay, averages);
  }

  void rows(int64_t from, int64_t to) const {
    const raw *first = direction(from * t.cols, t.cols, true);
    float sum = looks_ahead() ? sum_of_row(ahead(from * t.cols), t.cols)
                              : sum_of_squares<TYPE>(first, t.cols);
    for (int64_t row = from; row < to; ++row) {
      const float by = factor(sum, t.cols, r, scale_of(t, r));
      if (row + 1 < to) {
        sum = step_and_sum(row, by);
        continue;
      }
      const int64_t at = row * t.cols;
      raw *p = static_cast<raw *>(t.param) + at;
      if (looks_ahead())
        subtract_row<TYPE>(p, ahead(at), t.cols, lr, by, decay);
      else
        subtract<TYPE, TYPE>(p, direction(at, t.cols, false), t.cols, lr, by, decay);
    }
  }

  void column_sums(int64_t from, int64_t to, float *sums) const {
    constexpr int64_t AHEAD = 16384; /* bytes: a pure read outruns the hardware's prefetching */
    for (int64_t row = from; row < to; ++row) {
      const raw *x = direction(row * t.cols, t.cols, true);
      const char *ahead = reinterpret_cast<const char *>(x) + AHEAD;
      for (int64_t line = 0; line < t.cols * int64_t{sizeof(raw)}; line += 64)
        __builtin_prefetch(ahead + line);
      if (looks_ahead())
        add_squares(sums, this->ahead(row * t.cols), t.cols);
      else
        add_squares(sums, Values<TYPE>{x}, t.cols);
    }
  }

  void column_update(int64_t row, const float *by) const {
    const int64_t at = row * t.cols;
    raw *p = static_cast<raw *>(t.param) + at;
    if (looks_ahead())
      subtract_each<TYPE>(p, ahead(at), t.cols, lr, by, decay);
    else
      subtract_each<TYPE>(p, Values<TYPE>{direction(at, t.cols, false)}, t.cols, lr, by, decay);
  }
};

/* ---- Any types and roundings: blocks of floats. ---- */

struct Mixed {
  const oz_tensor &t;
  const Rule &r;
  const oz_options &o;
  uint32_t key;
  const float lr = lr_of(t), decay = t.weight_decay;

  const float *direction(int64_t at, int64_t n, bool update, float *buffer) const {
    if (!t.exp_avg) return load(t.grad, at, n, t.grad_type, buffer);
    const float *m0 = load(t.exp_avg, at, n, t.state_type, buffer);
    if (!update) return m0;
    float other[BLOCK];
    const float *g = load(t.grad, at, n, t.grad_type, other);
    float *m = target(t.exp_avg, at, t.state_type, buffer);
    if (m != m0) std::memcpy(m, m0, n * sizeof(float));
    average<OZ_F32, OZ_F32>(m, g, n, r.sign, r.rest);
    store(m, t.exp_avg, at, n, t.state_type);
    return load(t.exp_avg, at, n, t.state_type, buffer); /* as it is stored */
  }

  /* What a step follows: the direction or, of Nesterov's momentum, what it looks ahead to. */
  const float *followed(int64_t at, int64_t n, bool update, float *buffer) const {
    const float *x = direction(at, n, update, buffer);
    if (!r.nesterov || !t.exp_avg) return x;
    float other[BLOCK];
    const float *g = load(t.grad, at, n, t.grad_type, other);
    if (x != buffer) std::memcpy(buffer, x, n * sizeof(float));
    average<OZ_F32, OZ_F32>(buffer, g, n, r.sign, r.rest);
    return buffer;
  }

  template <typename Change>
  void change(int64_t at, int64_t n, Change step) const {
    float buffer[BLOCK];
    const float *p0 = load(t.param, at, n, t.param_type, buffer);
    float *p = target(t.param, at, t.param_type, buffer);
    if (p != p0) std::memcpy(p, p0, n * sizeof(float));
    step(p);
    put(p, t, at, n, o, key);
  }

  void rows(int64_t from, int64_t to) const {
    float buffer[BLOCK];
    for (int64_t row = from; row < to; ++row) {
      const int64_t begin = row * t.cols, end = begin + t.cols;
      float sum = 0.0f;
      for (int64_t at = begin; at < end; at += BLOCK) {
        const int64_t n = std::min(BLOCK, end - at);
        const float *x = followed(at, n, true, buffer);
        sum += sum_of_squares<OZ_F32>(x, n);
      }
      const float by = factor(sum, t.cols, r, scale_of(t, r));
      for (int64_t at = begin; at < end; at += BLOCK) {
        const int64_t n = std::min(BLOCK, end - at);
        const float *x = followed(at, n, false, buffer);
        change(at, n, [&](float *p) { subtract<OZ_F32, OZ_F32>(p, x, n, lr, by, decay); });
      }
    }
  }

  void signs(int64_t from, int64_t to) const {
    float buffer[BLOCK], signs[BLOCK];
    const float scale = scale_of(t, r);
    for (int64_t at = from; at < to; at += BLOCK) {
      const int64_t n = std::min(BLOCK, to - at);
      const float *x = followed(at, n, true, buffer);
      for (int64_t i = 0; i < n; ++i) {
        const float y = scale * x[i];
        signs[i] = y > 0 ? 1.0f : y < 0 ? -1.0f : y; /* zero and NaN stay */
      }
      change(at, n, [&](float *p) { subtract<OZ_F32, OZ_F32>(p, signs, n, lr, 1.0f, decay); });
    }
  }

  void column_sums(int64_t from, int64_t to, float *sums) const {
    float buffer[BLOCK];
    for (int64_t row = from; row < to; ++row)
      for (int64_t col = 0; col < t.cols; col += BLOCK) {
        const int64_t at = row * t.cols + col, n = std::min(BLOCK, t.cols - col);
        add_squares(sums + col, Values<OZ_F32>{followed(at, n, true, buffer)}, n);
      }
  }

  void column_update(int64_t row, const float *by) const {
    float buffer[BLOCK];
    for (int64_t col = 0; col < t.cols; col += BLOCK) {
      const int64_t at = row * t.cols + col, n = std::min(BLOCK, t.cols - col);
      const Values<OZ_F32> x = {followed(at, n, false, buffer)};
      change(at, n, [&](float *p) { subtract_each<OZ_F32>(p, x, n, lr, by + col, decay); });
    }
  }
};

/* `run` on the loops that fit the tensor. */
template <typename Run>
inline void with_loops(const oz_tensor &t, int64_t index, const Rule &r, const oz_options &o,
                       Run run) {
  const bool plain = o.rounding == OZ_NEAREST && t.grad_type == t.param_type &&
                     (!t.exp_avg || t.state_type == t.param_type);
  if (!plain)
    run(Mixed{t, r, o, rounding_key(o, index)});
  else if (t.param_type == OZ_F32)
    run(Plain<OZ_F32>{t, r});
  else if (t.param_type == OZ_BF16)
    run(Plain<OZ_BF16>{t, r});
  else
    run(Plain<OZ_F16>{t, r});
}

/* Whole chunks of rows backwards, each forwards, so that the hardware prefetches within them. */
template <typename Loops>
inline void column_updates(const Loops &loops, int64_t from, int64_t to, const float *by) {
  constexpr int64_t CHUNK = 512;
  for (int64_t last = to; last > from; last -= CHUNK)
    for (int64_t row = std::max(from, last - CHUNK); row < last; ++row)
      loops.column_update(row, by);
}

inline bool by_rows(const oz_tensor &t) { return t.kind == OZ_ROWS || t.kind == OZ_COLUMNS; }

/* Dealt apart, each evenly: of what takes one pass, and of what takes two, the same share twice. */
inline int64_t units_once(const oz_tensor &t) {
  return t.kind == OZ_COLUMNS ? 0 : t.kind == OZ_ROWS ? t.rows : blocks_of(t);
}

inline int64_t units_twice(const oz_tensor &t) { return t.kind == OZ_COLUMNS ? t.rows : 0; }

inline int64_t size_of(const oz_tensor &t) { return by_rows(t) ? t.cols : BLOCK; }

/* Sums at the start of a cache line: across two, each sixteen of them cost two accesses, and the
 * pass over an embedding twice its time. */
constexpr int64_t A_LINE = 16;
struct alignas(64) Line {
  float at[A_LINE];
};

}  // namespace

OZ_FUNCTION(scale) {
  const oz_options &o = *options;
  const Scalars s = scalars_of(o);
  if (s.skip) return 0;
  const Rule r = {s.sign, static_cast<float>(1.0 - o.momentum), static_cast<float>(o.eps),
                  o.l2 != 0, o.nesterov != 0};
  std::vector<int64_t> offset(count + 1, 0); /* of a tensor's columns among those of all */
  for (int64_t i = 0; i < count; ++i) {
    const int64_t cols = tensors[i].kind == OZ_COLUMNS ? tensors[i].cols : 0;
    offset[i + 1] = offset[i] + (cols + A_LINE - 1) / A_LINE * A_LINE; /* each begins a cache line */
  }
  const int64_t columns = offset[count];
  const int most = threads_of(o);
  std::vector<Line> sums_of_all(static_cast<size_t>(columns / A_LINE) * most);
  std::vector<Line> factors_of_all(columns / A_LINE);
  float *partial = reinterpret_cast<float *>(sums_of_all.data());
  float *factors = reinterpret_cast<float *>(factors_of_all.data());
#pragma omp parallel num_threads(most)
  {
    const int me = omp_get_thread_num(), of = omp_get_num_threads();
    float *sums = partial + static_cast<size_t>(columns) * me;
    deal(tensors, count, me, of, units_once, size_of, [&](int64_t i, int64_t from, int64_t to) {
      const oz_tensor &t = tensors[i];
      const int64_t n = t.rows * t.cols;
      if (t.kind == OZ_ROWS) {
        with_loops(t, i, r, o, [&](const auto &loops) { loops.rows(from, to); });
      } else if (t.kind == OZ_SIGN) {
        Mixed{t, r, o, rounding_key(o, i)}.signs(from * BLOCK, std::min(n, to * BLOCK));
      } else {
        const AdamRule rule = adam_rule(t, o, s, true);
        const uint32_t key = rounding_key(o, i);
        for (int64_t b = from; b < to; ++b)
          adam_block(t, b * BLOCK, std::min(BLOCK, n - b * BLOCK), rule, o, key, nullptr);
      }
    });
    if (columns > 0) {
      deal(tensors, count, me, of, units_twice, size_of, [&](int64_t i, int64_t from, int64_t to) {
        with_loops(tensors[i], i, r, o,
                   [&](const auto &loops) { loops.column_sums(from, to, sums + offset[i]); });
      });
#pragma omp barrier
#pragma omp for
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t i = std::upper_bound(offset.begin(), offset.end(), j) - offset.begin() - 1;
        float sum = 0.0f;
        for (int k = 0; k < of; ++k) sum += partial[static_cast<size_t>(columns) * k + j];
        factors[j] = factor(sum, tensors[i].rows, r, scale_of(tensors[i], r));
      }
      deal(tensors, count, me, of, units_twice, size_of, [&](int64_t i, int64_t from, int64_t to) {
        with_loops(tensors[i], i, r, o, [&](const auto &loops) {
          column_updates(loops, from, to, factors + offset[i]);
        });
      });
    }
  }
  return 0;
}
