/* SCALE's update by columns, from the partial sums of columns.cuh. */
#ifndef OZ_CUDA_SCALE_COLUMNS_CUH
#define OZ_CUDA_SCALE_COLUMNS_CUH

#include "columns.cuh"
#include "scale_rule.cuh"

/* The factors of a part's columns, from the partial sums of all chunks, into by[TILE]. */
OZ_DEVICE void column_factors(const Slot &t, const Rule &r, const Part &part, float *by) {
  constexpr int SHARES = THREADS / TILE;
  __shared__ float shared[SHARES][TILE];
  const int thread = static_cast<int>(threadIdx.x), column = thread % TILE, share = thread / TILE;
  const int chunks = chunks_of(t.rows, t.cols);
  const int64_t col = part.col + column;
  float sum = 0.0f;
  if (col < t.cols) {
#pragma unroll 8
    for (int chunk = share; chunk < chunks; chunk += SHARES)
      sum += t.extra[chunk * t.cols + col];
  }
  shared[share][column] = sum;
  __syncthreads();
  if (share == 0) {
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < SHARES; ++k) total += shared[k][column];
    by[column] = factor(total, t, r);
  }
  __syncthreads();
}

/* A lane's rows from the last to the first, with the loads of AHEAD rows in flight. ANY: the decay may
 * be cautious, and Nesterov's momentum looked ahead from. */
template <int AHEAD, bool ANY>
OZ_DEVICE void update_rows(const Slot &t, const Rule &r, const Scalars &s, const Part &part,
                           const Lane &lane, const float *by, int type, int param_type, bool wide) {
  const void *from = t.exp_avg ? t.exp_avg : t.grad;
  const float sign = t.exp_avg ? 1.0f : s.sign;
  for (int64_t row = part.to - 1 - lane.warp; row >= part.from; row -= AHEAD * WARPS) {
    Eight raw_x[AHEAD], raw_p[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int64_t count = row - k * WARPS >= part.from ? lane.count : 0;
      const int64_t at = (row - k * WARPS) * t.cols + lane.col;
      raw_x[k] = load(from, at, count, type, wide);
      raw_p[k] = load(t.param, at, count, param_type, wide);
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      if (row - k * WARPS < part.from) break;
      const int64_t at = (row - k * WARPS) * t.cols + lane.col;
      float x[EIGHT], p[EIGHT];
      unpack(raw_x[k], type, x);
      if (ANY && t.exp_avg && r.nesterov) {
        unpack(load(t.grad, at, lane.count, t.grad_type, wide), t.grad_type, p);
#pragma unroll
        for (int i = 0; i < EIGHT; ++i) x[i] = averaged(x[i], s.sign * p[i], r);
      }
      unpack(raw_p[k], param_type, p);
#pragma unroll
      for (int i = 0; i < EIGHT; ++i) p[i] = stepped<ANY>(p[i], sign * x[i], by[i], t, s);
      round_results(p, param_type, t, r, at);
      store(t.param, at, lane.count, param_type, wide, p);
    }
  }
}

/* The last unit and its last rows come first: what the sums read last is still in the cache. */
OZ_DEVICE void column_update(const Slot &t, const Rule &r, uint32_t unit) {
  const Scalars s = scalars_of(t, r);
  __shared__ float factors[TILE];
  const uint32_t units = static_cast<uint32_t>(column_units(t.rows, t.cols));
  const Part part = part_of(t.rows, t.cols, units - 1 - unit);
  const Lane lane = lane_of(part, t.cols, static_cast<int>(threadIdx.x));
  column_factors(t, r, part, factors);
  if (lane.count <= 0) return;
  const float *by = factors + threadIdx.x % WARP * EIGHT;
  const int type = t.exp_avg ? t.state_type : t.grad_type;
  const bool ahead = t.exp_avg && r.nesterov;
  const bool plain = t.wide && type == t.param_type && !(t.decay < 0.0f) && !ahead;
  if (plain && type == OZ_BF16)
    update_rows<2, false>(t, r, s, part, lane, by, OZ_BF16, OZ_BF16, true);
  else if (plain && type == OZ_F32)
    update_rows<1, false>(t, r, s, part, lane, by, OZ_F32, OZ_F32, true);
  else
    update_rows<1, true>(t, r, s, part, lane, by, type, t.param_type, t.wide);
}

#endif
