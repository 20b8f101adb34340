/* SWAN's row statistics: see optimzoo.h. A row is read once and held in registers; what does not
 * fit there is read again, from a cache. */
#pragma GCC visibility push(default)
#include "optimzoo.h"
#pragma GCC visibility pop

#include "rows.cuh"

namespace {

/* sign / max(std, eps), from the sum of the squares of what is left of g. */
OZ_DEVICE float factor(float squares, const Slot &t, const Rule &r) {
  const float sign = gradient_sign(r), square = squares * t.share * sign * sign;
  return sign * (square <= r.floor ? r.most : rsqrtf(square));
}

template <int TYPE>
OZ_DEVICE void held_row(const Slot &t, const Rule &r, uint32_t unit) {
  constexpr int N = Vector<TYPE>::COUNT;
  const Team team = team_of(t.team, static_cast<int>(threadIdx.x));
  const Place place = place_of(t, row_of(team, unit), team, N);
  uint4 g[BATCH];
  place.load(g, t.grad, 0);
  float x[N], sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < BATCH; ++i) {
    unpack<TYPE>(g[i], x);
#pragma unroll
    for (int k = 0; k < N; ++k) sum += x[k];
  }
  const float mean = team_sum(team, sum) * t.share;
#pragma unroll
  for (int i = 0; i < BATCH; ++i) {
    if (turn_at(0, i) >= place.left) break;
    unpack<TYPE>(g[i], x);
#pragma unroll
    for (int k = 0; k < N; ++k) squares = fmaf(x[k] - mean, x[k] - mean, squares);
  }
  const float by = factor(team_sum(team, squares), t, r);
#pragma unroll
  for (int i = 0; i < BATCH; ++i) {
    unpack<TYPE>(g[i], x);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = by * (x[k] - mean);
    round_results(x, TYPE, t, r, (place.first + turn_at(0, i)) * N);
    place.store(t.param, 0, i, pack<TYPE>(x));
  }
}

OZ_DEVICE void any_row(const Slot &t, const Rule &r, uint32_t unit) {
  const Team team = team_of(t.team, static_cast<int>(threadIdx.x));
  const int64_t row = row_of(team, unit), cols = row < t.rows ? t.cols : 0, begin = row * t.cols;
  float sum = 0.0f, squares = 0.0f;
  for (int64_t col = team.lane; col < cols; col += team.size)
    sum += get(t.grad, begin + col, t.grad_type);
  const float mean = team_sum(team, sum) * t.share;
  for (int64_t col = team.lane; col < cols; col += team.size) {
    const float x = get(t.grad, begin + col, t.grad_type) - mean;
    squares = fmaf(x, x, squares);
  }
  const float by = factor(team_sum(team, squares), t, r);
  for (int64_t col = team.lane; col < cols; col += team.size) {
    const int64_t at = begin + col;
    float x[1] = {by * (get(t.grad, at, t.grad_type) - mean)};
    round_results(x, t.param_type, t, r, at);
    put(t.param, at, t.param_type, x[0]);
  }
}

// budget: center_kernel 64 LDG.E.128 STG.E.128
__global__ void __launch_bounds__(THREADS, BLOCKS)
    center_kernel(const Table __grid_constant__ table) {
  const Rule &r = table.rule;
  if (skipped(r)) return;
  for_each_unit(table, [&](const Slot &t, uint32_t unit, bool) {
    if (!t.wide)
      any_row(t, r, unit);
    else if (t.grad_type == OZ_F32)
      held_row<OZ_F32>(t, r, unit);
    else if (t.grad_type == OZ_BF16)
      held_row<OZ_BF16>(t, r, unit);
    else
      held_row<OZ_F16>(t, r, unit);
  });
}

int64_t cut(Slot &slot, const oz_tensor &t) {
  const int turn = turn_of(t.grad_type);
  slot.wide = t.param_type == t.grad_type && t.cols % turn == 0 && wide(t, turn) &&
              batches_of(t.cols / turn) == 1;
  slot.team = static_cast<uint16_t>(team_size(t.cols, turn));
  return row_units(t.rows, slot.team);
}

}  // namespace

int oz_cuda_center(const oz_tensor *tensors, int64_t count, const oz_options *options,
                   void *stream) {
  const Launch how = {static_cast<cudaStream_t>(stream)};
  return for_tables(tensors, count, *options, cut,
                    [&](const Table &table) { return launch(center_kernel, table, how); });
}
