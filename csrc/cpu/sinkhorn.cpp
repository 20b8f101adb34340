/* SinkGD: see optimzoo.h. X = diag(r) G diag(c) is never written: a pass reads a few rows of G, scales
 * them by their norms and adds their squares to the columns' sums while the cache holds them.
 *
 * As many tensors as the caches hold take their passes together, each from the end where the last one
 * stopped. A unit of rows has sums of its own, added in their order: the threads change no result. */
#include <cfloat>
#include <cmath>
#include <type_traits>
#include <vector>

#include "work.h"

namespace {

constexpr int64_t GROUP = 4;  /* rows at a time: c and the sums are read once for them */
constexpr int64_t CHUNK = 64; /* rows a unit, a multiple of GROUP */
constexpr int64_t A_LINE = 16;
constexpr int64_t CACHED = int64_t{1} << 18; /* elements a thread: 1 MB in float32 */

struct alignas(64) Line {
  float at[A_LINE];
};

inline int64_t units_of(const oz_tensor &t) { return (t.rows + CHUNK - 1) / CHUNK; }
inline int64_t size_of(const oz_tensor &t) { return std::min(CHUNK, t.rows) * t.cols; }

/* The scale of a row or column whose squares, with the scale that it has, have this sum. One of zeros
 * keeps a finite scale, so it stays zero; a NaN stays one. */
inline float rescaled(float scale, float sum, int64_t n) {
  const float rms = std::sqrt(sum / static_cast<float>(n));
  const float quotient = scale / (rms < FLT_MIN ? FLT_MIN : rms);
  return quotient > FLT_MAX ? FLT_MAX : quotient < -FLT_MAX ? -FLT_MAX : quotient;
}

/* Rows of a matrix: X's elements from those of G. In this order: r is in the inverse unit of G. */
template <int TYPE>
struct Rows {
  using raw = typename Element<TYPE>::raw;
  const raw *g;
  int64_t cols;
  float *r;
  const float *c;

  floats lanes(int64_t row, int64_t i, floats by) const {
    return get<TYPE>(g + row * cols + i) * r[row] * by;
  }
  float one(int64_t row, int64_t i) const {
    return Element<TYPE>::get(g[row * cols + i]) * r[row] * c[i];
  }
  Rows from(int64_t row) const { return {g + row * cols, cols, r + row, c}; }
};

/* Scale N rows to the root mean square 1. */
template <int64_t N, int TYPE>
inline void normalize_rows(Rows<TYPE> x) {
  floats sums[N] = {};
  float tails[N] = {};
  int64_t i = 0;
  for (; i + LANES <= x.cols; i += LANES) {
    const floats by = get<OZ_F32>(x.c + i);
    for (int64_t k = 0; k < N; ++k) {
      const floats v = x.lanes(k, i, by);
      sums[k] += v * v;
    }
  }
  for (; i < x.cols; ++i)
    for (int64_t k = 0; k < N; ++k) tails[k] += x.one(k, i) * x.one(k, i);
  for (int64_t k = 0; k < N; ++k) x.r[k] = rescaled(x.r[k], total(sums[k]) + tails[k], x.cols);
}

/* Add the squares of N rows to the columns' sums. */
template <int64_t N, int TYPE>
inline void add_squares_of(Rows<TYPE> x, float *sums) {
  int64_t i = 0;
  for (; i + LANES <= x.cols; i += LANES) {
    const floats by = get<OZ_F32>(x.c + i);
    floats sum = get<OZ_F32>(sums + i);
    for (int64_t k = 0; k < N; ++k) {
      __builtin_prefetch(x.g + (k + N) * x.cols + i); /* the next rows: the caches fill meanwhile */
      const floats v = x.lanes(k, i, by);
      sum += v * v;
    }
    put<OZ_F32>(sums + i, sum);
  }
  for (; i < x.cols; ++i)
    for (int64_t k = 0; k < N; ++k) sums[i] += x.one(k, i) * x.one(k, i);
}

/* p[i] = p[i] - lr (x[i] + decay p[i]), of a part of a row */
template <int PTYPE, int TYPE>
inline void step_row(typename Element<PTYPE>::raw *p, Rows<TYPE> x, int64_t n, float lr,
                     float decay) {
  using P = Element<PTYPE>;
  with_decay(lr, decay, [&](auto step) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
      put<PTYPE>(p + i, step(get<PTYPE>(p + i), lr, x.lanes(0, i, get<OZ_F32>(x.c + i))));
    for (; i < n; ++i) p[i] = P::make(step(P::get(p[i]), lr, x.one(0, i)));
  });
}

/* Call `run` with a group's rows as a constant: most are full. */
template <typename Run>
inline void by_groups(int64_t from, int64_t to, Run run) {
  int64_t row = from;
  for (; row + GROUP <= to; row += GROUP) run(row, std::integral_constant<int64_t, GROUP>{});
  for (; row < to; ++row) run(row, std::integral_constant<int64_t, 1>{});
}

template <typename Run>
inline void with_type(int type, Run run) {
  if (type == OZ_F32)
    run(std::integral_constant<int, OZ_F32>{});
  else if (type == OZ_BF16)
    run(std::integral_constant<int, OZ_BF16>{});
  else
    run(std::integral_constant<int, OZ_F16>{});
}

template <int TYPE>
inline void pass(Rows<TYPE> x, int64_t from, int64_t to, bool normalize, float *sums) {
  std::fill(sums, sums + x.cols, 0.0f);
  by_groups(from, to, [&](int64_t row, auto n) {
    if (normalize) normalize_rows<n>(x.from(row));
    add_squares_of<n>(x.from(row), sums);
  });
}

template <int TYPE>
inline void update(Rows<TYPE> x, int64_t from, int64_t to, bool normalize, const oz_tensor &t,
                   const oz_options &o, uint32_t key) {
  const float lr = lr_of(t), decay = t.weight_decay;
  if (normalize)
    by_groups(from, to, [&](int64_t row, auto n) { normalize_rows<n>(x.from(row)); });
  for (int64_t row = from; row < to; ++row) {
    if (o.rounding == OZ_NEAREST) {
      with_type(t.param_type, [&](auto type) {
        using raw = typename Element<type>::raw;
        step_row<type>(static_cast<raw *>(t.param) + row * t.cols, x.from(row), t.cols, lr, decay);
      });
      continue;
    }
    float buffer[BLOCK];
    for (int64_t col = 0; col < t.cols; col += BLOCK) {
      const int64_t at = row * t.cols + col, n = std::min(BLOCK, t.cols - col);
      const float *p0 = load(t.param, at, n, t.param_type, buffer);
      float *p = target(t.param, at, t.param_type, buffer);
      if (p != p0) std::memcpy(p, p0, n * sizeof(float));
      step_row<OZ_F32>(p, Rows<TYPE>{x.g + row * t.cols + col, t.cols, x.r + row, x.c + col}, n,
                       lr, decay);
      put(p, t, at, n, o, key);
    }
  }
}

/* A tensor's scratch: each begins a cache line, a unit's sums too. */
struct Scratch {
  float *r, *c, *sums;
};

inline int64_t lines_for(int64_t n) { return (n + A_LINE - 1) / A_LINE; }

inline int64_t scratch_lines(const oz_tensor &t) {
  return lines_for(t.rows) + (1 + units_of(t)) * lines_for(t.cols);
}

/* Tensors [first, last), which take their passes together. */
struct Batch {
  int64_t first, last;
};

inline std::vector<Batch> batches_of(const oz_tensor *tensors, int64_t count, int threads) {
  std::vector<Batch> batches;
  int64_t elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = tensors[i].rows * tensors[i].cols;
    if (batches.empty() || elements + n > CACHED * threads) {
      batches.push_back({i, i});
      elements = 0;
    }
    batches.back().last = i + 1;
    elements += n;
  }
  return batches;
}

}  // namespace

OZ_FUNCTION(sinkhorn) {
  const oz_options &o = *options;
  if (scalars_of(o).skip) return 0;
  const float sign = scalars_of(o).sign;
  const int most = threads_of(o);
  const std::vector<Batch> batches = batches_of(tensors, count, most);
  std::vector<int64_t> offset(count); /* in the scratch, which the batches share */
  int64_t largest = 0;
  for (const Batch &batch : batches) {
    int64_t lines = 0;
    for (int64_t i = batch.first; i < batch.last; ++i) {
      offset[i] = lines;
      lines += scratch_lines(tensors[i]);
    }
    largest = std::max(largest, lines);
  }
  std::vector<Line> lines(largest);
  const auto scratch_of = [&](int64_t i) -> Scratch {
    float *r = reinterpret_cast<float *>(lines.data() + offset[i]);
    float *c = r + A_LINE * lines_for(tensors[i].rows);
    return {r, c, c + A_LINE * lines_for(tensors[i].cols)};
  };
#pragma omp parallel num_threads(most)
  {
    const int me = omp_get_thread_num(), of = omp_get_num_threads();
    for (const Batch &batch : batches) {
      const auto rows = [&](bool forward, auto run) {
        deal(tensors + batch.first, batch.last - batch.first, me, of, units_of, size_of,
             [&](int64_t j, int64_t from, int64_t to) {
               const int64_t i = batch.first + j;
               for (int64_t k = 0; k < to - from; ++k) run(i, forward ? from + k : to - 1 - k);
             });
      };
      const auto columns = [&](auto run) {
        deal(
            tensors + batch.first, batch.last - batch.first, me, of,
            [](const oz_tensor &t) { return lines_for(t.cols); },
            [](const oz_tensor &t) { return A_LINE * units_of(t); },
            [&](int64_t j, int64_t from, int64_t to) {
              const int64_t i = batch.first + j;
              run(tensors[i], scratch_of(i), from * A_LINE, std::min(tensors[i].cols, to * A_LINE));
            });
      };
      columns([&](const oz_tensor &, Scratch s, int64_t from, int64_t to) {
        std::fill(s.c + from, s.c + to, 1.0f);
      });
#pragma omp barrier
      for (int32_t k = 0; k <= o.iterations; ++k) {
        rows(k % 2 == 0, [&](int64_t i, int64_t unit) {
          const oz_tensor &t = tensors[i];
          const Scratch s = scratch_of(i);
          const int64_t from = unit * CHUNK, to = std::min(t.rows, from + CHUNK);
          if (k == 0) std::fill(s.r + from, s.r + to, sign);
          with_type(t.grad_type, [&](auto type) {
            using raw = typename Element<type>::raw;
            const Rows<type> x = {static_cast<const raw *>(t.grad), t.cols, s.r, s.c};
            if (k < o.iterations)
              pass(x, from, to, t.kind == OZ_ROWS || k > 0,
                   s.sums + unit * A_LINE * lines_for(t.cols));
            else
              update(x, from, to, t.kind == OZ_COLUMNS, t, o, rounding_key(o, i));
          });
        });
#pragma omp barrier
        if (k == o.iterations) break;
        columns([&](const oz_tensor &t, Scratch s, int64_t from, int64_t to) {
          for (int64_t unit = 1; unit < units_of(t); ++unit) {
            const float *sums = s.sums + unit * A_LINE * lines_for(t.cols);
            for (int64_t j = from; j < to; ++j) s.sums[j] += sums[j];
          }
          for (int64_t j = from; j < to; ++j) s.c[j] = rescaled(s.c[j], s.sums[j], t.rows);
        });
#pragma omp barrier
      }
    }
  }
  return 0;
}
