/* A step along the gradient, scaled by row, by column or as a whole: see optimzoo.h. */
#pragma GCC visibility push(default)
#include "optimzoo.h"
#pragma GCC visibility pop

#include "rows.cuh"

namespace {

/* p = keep p - lr s g on eight columns. */
OZ_DEVICE void apply_eight(const Slot &t, const Rule &r, int64_t row, int64_t col,
                           const Eight &raw_g, const Eight &raw_p, int grad_type, int param_type,
                           bool wide) {
  const int64_t at = row * t.cols + col, count = t.cols - col;
  if (count <= 0) return;
  const Scalars s = scalars_of(t, r);
  const float step = -s.lr * s.sign;
  float g[EIGHT], p[EIGHT], by[EIGHT];
  if (t.kind == OZ_COLUMNS) {
    unpack(load(t.extra, col, count, OZ_F32, aligned(t.extra)), OZ_F32, by);
  } else {
    const float whole = t.extra[t.kind == OZ_ROWS ? row : 0];
#pragma unroll
    for (int i = 0; i < EIGHT; ++i) by[i] = whole;
  }
  unpack(raw_g, grad_type, g);
  unpack(raw_p, param_type, p);
#pragma unroll
  for (int i = 0; i < EIGHT; ++i) {
    const float size = step * by[i], keep = 1.0f - decay_at(s.lr * t.decay, p[i], -size * g[i]);
    p[i] = fmaf(size, g[i], keep * p[i]);
  }
  round_results(p, param_type, t, r, at);
  store(t.param, at, count, param_type, wide, p);
}

/* A unit, with the loads of AHEAD chunks in flight. */
template <int AHEAD>
OZ_DEVICE void apply_unit(const Slot &t, const Rule &r, uint32_t unit, int grad_type,
                          int param_type, bool wide) {
  const Team team = team_of(t.team, static_cast<int>(threadIdx.x));
  const Segment segment = segment_of(t.cols, team, unit);
  if (segment.row >= t.rows) return;
  const int64_t stride = int64_t{team.size} * EIGHT;
  const int64_t first = segment.col + int64_t{team.lane} * EIGHT;
#pragma unroll 1
  for (int64_t from = first; from < first + CHUNKS * stride; from += AHEAD * stride) {
    Eight g[AHEAD], p[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int64_t col = from + k * stride, at = segment.row * t.cols + col;
      g[k] = load(t.grad, at, t.cols - col, grad_type, wide);
      p[k] = load(t.param, at, t.cols - col, param_type, wide);
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k)
      apply_eight(t, r, segment.row, from + k * stride, g[k], p[k], grad_type, param_type, wide);
  }
}

// budget: apply_kernel 64 LDG.E.128 STG.E.128
__global__ void __launch_bounds__(THREADS, BLOCKS)
    apply_kernel(const Table __grid_constant__ table) {
  const Rule &r = table.rule;
  if (skipped(r)) return;
  for_each_unit(table, [&](const Slot &t, uint32_t unit, bool) {
    const bool plain = t.wide && t.grad_type == t.param_type;
    if (plain && t.param_type == OZ_BF16)
      apply_unit<2>(t, r, unit, OZ_BF16, OZ_BF16, true);
    else if (plain && t.param_type == OZ_F32)
      apply_unit<1>(t, r, unit, OZ_F32, OZ_F32, true);
    else
      apply_unit<1>(t, r, unit, t.grad_type, t.param_type, t.wide);
  });
}

int64_t cut(Slot &slot, const oz_tensor &t) {
  if (t.kind == OZ_SIGN) cut_elements(slot, t);
  slot.team = static_cast<uint16_t>(segment_team(slot.cols));
  return segment_units(slot.rows, slot.cols, slot.team);
}

}  // namespace

int oz_cuda_apply(const oz_tensor *tensors, int64_t count, const oz_options *options,
                  void *stream) {
  const Launch how = {static_cast<cudaStream_t>(stream)};
  return for_tables(tensors, count, *options, cut,
                    [&](const Table &table) { return launch(apply_kernel, table, how); });
}
