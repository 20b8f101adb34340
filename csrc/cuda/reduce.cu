/* Sums of squares by row, by column, and over a clipped tensor: see optimzoo.h. Rows take one
 * launch; columns and tensors two, with partial sums of fixed parts in between. */
#pragma GCC visibility push(default)
#include "optimzoo.h"
#pragma GCC visibility pop

#include "columns.cuh"
#include "rows.cuh"
#include "scratch.cuh"

namespace {

constexpr int EACH = 4; /* chunks of eight elements of a whole tensor a thread */
constexpr int64_t WHOLE_UNIT = EACH * ELEMENTS;

/* ---- Rows. ---- */

/* With the loads of AHEAD chunks in flight; they do not change the order of the sum. */
template <int AHEAD>
OZ_DEVICE void row_sums(const Slot &t, float sign, uint32_t unit, int type, bool wide) {
  const Team team = team_of(t.team, static_cast<int>(threadIdx.x));
  const int64_t row = row_of(team, unit), cols = row < t.rows ? t.cols : 0;
  const int64_t stride = int64_t{team.size} * EIGHT;
  float sums[EIGHT] = {};
  for (int64_t from = int64_t{team.lane} * EIGHT; from < cols; from += AHEAD * stride) {
    Eight raw[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k)
      raw[k] = load(t.grad, row * t.cols + from + k * stride, cols - from - k * stride,
                    type, wide);
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      float x[EIGHT];
      unpack(raw[k], type, x);
#pragma unroll
      for (int i = 0; i < EIGHT; ++i) x[i] *= sign;
      add_squares(x, sums);
    }
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < EIGHT; ++i) sum += sums[i];
  sum = team_sum(team, sum);
  if (team.lane == 0 && row < t.rows) t.extra[row] = sum;
}

/* ---- Whole tensors, clipped. ---- */

/* The largest |g|, by its bits, among which a NaN's are the largest; and the sum of c(g)^2. */
struct Whole {
  uint32_t most;
  float sum;
};

/* The block's, in thread 0. */
OZ_DEVICE Whole block_whole(Whole w) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, w.most, step);
    w.most = other > w.most ? other : w.most;
    w.sum += __shfl_xor_sync(0xffffffffu, w.sum, step);
  }
  __shared__ Whole parts[WARPS];
  __syncthreads(); /* the last ones have been read */
  if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = w;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < WARPS; ++i) {
      w.most = parts[i].most > w.most ? parts[i].most : w.most;
      w.sum += parts[i].sum;
    }
  }
  return w;
}

/* With the loads of AHEAD chunks in flight. */
template <int AHEAD>
OZ_DEVICE void whole_sums(const Slot &t, float sign, uint32_t unit, int type, bool wide) {
  const float bound = t.extra[2], ratio = t.extra[3];
  const int64_t first = unit * WHOLE_UNIT + int64_t{threadIdx.x} * EIGHT;
  Whole w = {0, 0.0f};
#pragma unroll 1
  for (int64_t from = first; from < first + WHOLE_UNIT; from += AHEAD * ELEMENTS) {
    Eight raw[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) /* zeros behind the end */
      raw[k] = load(t.grad, from + k * ELEMENTS, t.cols - from - k * ELEMENTS, type, wide);
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      float g[EIGHT];
      unpack(raw[k], type, g);
#pragma unroll
      for (int i = 0; i < EIGHT; ++i) {
        const float x = fabsf(sign * g[i]), c = bound > 0.0f && x > bound ? ratio * x : x;
        const uint32_t bits = bits_as<uint32_t>(x);
        w.most = bits > w.most ? bits : w.most;
        w.sum = fmaf(c, c, w.sum);
      }
    }
  }
  w = block_whole(w);
  float *partial = static_cast<float *>(t.param);
  if (threadIdx.x == 0) {
    partial[2 * unit] = bits_as<float>(w.most);
    partial[2 * unit + 1] = w.sum;
  }
}

template <int AHEAD>
OZ_DEVICE void sums_unit(const Slot &t, const Rule &r, uint32_t unit, int type, bool wide) {
  const float sign = gradient_sign(r);
  if (t.kind == OZ_ROWS)
    row_sums<AHEAD>(t, sign, unit, type, wide);
  else
    whole_sums<AHEAD>(t, sign, unit, type, wide);
}

// budget: reduce_sums 64 LDG.E.128
__global__ void __launch_bounds__(THREADS, BLOCKS)
    reduce_sums(const Table __grid_constant__ table) {
  const Rule &r = table.rule;
  if (skipped(r)) return;
  for_each_unit(table, [&](const Slot &t, uint32_t unit, bool) {
    if (t.kind == OZ_COLUMNS)
      column_sums<false>(t, r, gradient_sign(r), unit, static_cast<float *>(t.param));
    else if (t.wide && t.grad_type == OZ_BF16)
      sums_unit<4>(t, r, unit, OZ_BF16, true);
    else if (t.wide && t.grad_type == OZ_F32)
      sums_unit<2>(t, r, unit, OZ_F32, true);
    else
      sums_unit<1>(t, r, unit, t.grad_type, t.wide);
  });
}

/* ---- The partial sums, added up in their order. ---- */

OZ_DEVICE void combine_columns(const Slot &t, uint32_t unit) {
  const float *partial = static_cast<const float *>(t.param);
  const int64_t col = int64_t{unit} * THREADS + threadIdx.x;
  if (col >= t.cols) return;
  const int chunks = chunks_of(t.rows, t.cols);
  float sum = 0.0f;
#pragma unroll 8
  for (int chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * t.cols + col];
  t.extra[col] = sum;
}

OZ_DEVICE void combine_whole(const Slot &t) {
  const float *partial = static_cast<const float *>(t.param);
  const int64_t parts = ceil_div(t.cols, WHOLE_UNIT);
  Whole w = {0, 0.0f};
  for (int64_t i = threadIdx.x; i < parts; i += THREADS) {
    const uint32_t bits = bits_as<uint32_t>(partial[2 * i]);
    w.most = bits > w.most ? bits : w.most;
    w.sum += partial[2 * i + 1];
  }
  w = block_whole(w);
  if (threadIdx.x == 0) {
    t.extra[0] = bits_as<float>(w.most);
    t.extra[1] = w.sum;
  }
}

// budget: reduce_combine 64
__global__ void __launch_bounds__(THREADS, BLOCKS)
    reduce_combine(const Table __grid_constant__ table) {
  if (skipped(table.rule)) return;
  for_each_unit(table, [&](const Slot &t, uint32_t unit, bool) {
    if (t.kind == OZ_COLUMNS)
      combine_columns(t, unit);
    else
      combine_whole(t);
  });
}

/* ---- The host's side. ---- */

int64_t cut(Slot &slot, const oz_tensor &t) {
  if (t.kind == OZ_COLUMNS) return column_units(t.rows, t.cols);
  if (t.kind == OZ_SIGN) {
    cut_elements(slot, t);
    return ceil_div(slot.cols, WHOLE_UNIT);
  }
  slot.team = static_cast<uint16_t>(team_size(t.cols, EIGHT));
  return row_units(t.rows, slot.team);
}

/* Floats of partial sums of a tensor. */
int64_t partial_floats(const oz_tensor &t) {
  if (t.kind == OZ_COLUMNS) return chunks_of(t.rows, t.cols) * t.cols;
  return t.kind == OZ_SIGN ? 2 * ceil_div(t.rows * t.cols, WHOLE_UNIT) : 0;
}

cudaError_t reduce(const oz_tensor *tensors, int64_t count, const oz_options &o, const Launch &how,
                   float *scratch) {
  /* `param`, which has no other use here, is where a slot's partial sums are. */
  float *next = scratch;
  cudaError_t error = for_tables(
      tensors, count, o,
      [&](Slot &slot, const oz_tensor &t) {
        slot.param = next;
        next += partial_floats(t);
        return cut(slot, t);
      },
      [&](const Table &table) { return launch(reduce_sums, table, how); });
  if (error != cudaSuccess || scratch == nullptr) return error;
  next = scratch;
  return for_tables(
      tensors, count, o,
      [&](Slot &slot, const oz_tensor &t) -> int64_t {
        slot.param = next;
        next += partial_floats(t);
        if (t.kind == OZ_COLUMNS) return ceil_div(t.cols, THREADS);
        if (t.kind != OZ_SIGN) return 0;
        cut_elements(slot, t);
        return 1;
      },
      [&](const Table &table) { return launch(reduce_combine, table, how); });
}

}  // namespace

int oz_cuda_reduce(const oz_tensor *tensors, int64_t count, const oz_options *options,
                   void *stream) {
  const Launch how = {static_cast<cudaStream_t>(stream)};
  int64_t floats = 0;
  for (int64_t i = 0; i < count; ++i) floats += partial_floats(tensors[i]);
  return with_scratch(floats, how.stream, [&](float *scratch) {
    return reduce(tensors, count, *options, how, scratch);
  });
}
