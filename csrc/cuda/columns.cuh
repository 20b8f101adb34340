/* Sums over a tensor's columns: one partial sum a column from each of a fixed number of chunks of
 * rows, which whoever needs the sum adds up in order. No atomics: the result is always the same. */
#ifndef OZ_CUDA_COLUMNS_CUH
#define OZ_CUDA_COLUMNS_CUH

#include "scale_rule.cuh"

constexpr int TILE = WARP * EIGHT; /* columns of a warp; a block's warps take different rows */
/* Few enough that adding them up is a small part of the update; of few tiles more, or they would not
 * give each multiprocessor its two blocks. */
constexpr int MOST_CHUNKS = 64, MOST_CHUNKS_OF_FEW = 128, FEW_TILES = 2;

OZ_BOTH int chunks_of(int64_t rows, int64_t cols) {
  const int64_t most = cols <= FEW_TILES * TILE ? MOST_CHUNKS_OF_FEW : MOST_CHUNKS;
  const int64_t chunks = ceil_div(rows, 2 * WARPS);
  return static_cast<int>(chunks < most ? chunks : most);
}

OZ_BOTH int64_t column_units(int64_t rows, int64_t cols) {
  return chunks_of(rows, cols) * ceil_div(cols, TILE);
}

/* A tile of columns in a chunk of rows [from, to). */
struct Part {
  int64_t col, from, to;
  int chunk;
};

/* Chunk by chunk, so that blocks that run at one time read neighbouring memory. */
OZ_BOTH Part part_of(int64_t rows, int64_t cols, uint32_t unit) {
  const uint32_t tiles = static_cast<uint32_t>(ceil_div(cols, TILE));
  const int chunk = static_cast<int>(unit / tiles), chunks = chunks_of(rows, cols);
  return {int64_t{unit % tiles} * TILE, rows * chunk / chunks, rows * (chunk + 1) / chunks, chunk};
}

/* A thread's eight columns in a part, and how many of them the tensor has. */
struct Lane {
  int64_t col, count;
  int warp;
};

OZ_BOTH Lane lane_of(const Part &part, int64_t cols, int thread) {
  const int64_t col = part.col + int64_t{thread % WARP} * EIGHT;
  return {col, cols - col, thread / WARP};
}

OZ_DEVICE void add_squares(const float *x, float *sums) {
#pragma unroll
  for (int i = 0; i < EIGHT; ++i) sums[i] = fmaf(x[i], x[i], sums[i]);
}

/* The gradients' squares of a lane's rows, with the loads of AHEAD rows in flight. */
template <int AHEAD>
OZ_DEVICE void add_gradients(const Slot &t, float sign, const Part &part, const Lane &lane,
                             int type, bool wide, float *sums) {
  for (int64_t row = part.from + lane.warp; row < part.to; row += AHEAD * WARPS) {
    Eight raw[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      const int64_t count = row + k * WARPS < part.to ? lane.count : 0;
      raw[k] = load(t.grad, (row + k * WARPS) * t.cols + lane.col, count, type, wide);
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      float x[EIGHT];
      unpack(raw[k], type, x);
#pragma unroll
      for (int i = 0; i < EIGHT; ++i) x[i] *= sign;
      add_squares(x, sums);
    }
  }
}

/* The momentum takes in the gradient; the squares are of what the step follows. */
OZ_DEVICE void add_momentum(const Slot &t, const Rule &r, float sign, const Part &part,
                            const Lane &lane, float *sums) {
  for (int64_t row = part.from + lane.warp; row < part.to; row += WARPS) {
    const int64_t at = row * t.cols + lane.col;
    const Eight raw_g = load(t.grad, at, lane.count, t.grad_type, t.wide);
    const Eight raw_m = load(t.exp_avg, at, lane.count, t.state_type, t.wide);
    float g[EIGHT], m[EIGHT];
    unpack(raw_g, t.grad_type, g);
    unpack(raw_m, t.state_type, m);
#pragma unroll
    for (int i = 0; i < EIGHT; ++i) g[i] *= sign;
#pragma unroll
    for (int i = 0; i < EIGHT; ++i) m[i] = averaged(m[i], g[i], r);
    store(t.exp_avg, at, lane.count, t.state_type, t.wide, m);
#pragma unroll
    for (int i = 0; i < EIGHT; ++i) m[i] = followed(nearest(m[i], t.state_type), g[i], r);
    add_squares(m, sums);
  }
}

/* The sums of squares of a unit's columns, into partial[chunk][column]. */
template <bool MOMENTUM>
OZ_DEVICE void column_sums(const Slot &t, const Rule &r, float sign, uint32_t unit,
                           float *partial) {
  __shared__ float shared[WARPS][TILE];
  const int thread = static_cast<int>(threadIdx.x);
  const Part part = part_of(t.rows, t.cols, unit);
  const Lane lane = lane_of(part, t.cols, thread);
  float sums[EIGHT] = {};
  if (lane.count > 0) {
    if (MOMENTUM && t.exp_avg)
      add_momentum(t, r, sign, part, lane, sums);
    else if (t.wide && t.grad_type == OZ_BF16)
      add_gradients<4>(t, sign, part, lane, OZ_BF16, true, sums);
    else if (t.wide && t.grad_type == OZ_F32)
      add_gradients<3>(t, sign, part, lane, OZ_F32, true, sums);
    else
      add_gradients<2>(t, sign, part, lane, t.grad_type, t.wide, sums);
  }
  __syncthreads(); /* the last unit's sums have been read */
#pragma unroll
  for (int i = 0; i < EIGHT; ++i) shared[lane.warp][(thread % WARP) * EIGHT + i] = sums[i];
  __syncthreads();
  const int64_t col = part.col + thread;
  if (thread < TILE && col < t.cols) {
    float sum = 0.0f;
    for (int warp = 0; warp < WARPS; ++warp) sum += shared[warp][thread];
    partial[part.chunk * t.cols + col] = sum;
  }
}

#endif
