/* SCALE: see optimzoo.h. Rows, signs and vectors take one launch, with each row read once and held
 * in registers; rows that do not begin at multiples of 16 bytes another, and rows too long for
 * registers, with them in shared memory; columns take two. */
#pragma GCC visibility push(default)
#include "optimzoo.h"
#pragma GCC visibility pop

#include "adam.cuh"
#include "rows.cuh"
#include "scale_columns.cuh"

namespace {

/* ---- Rows of one type, in 16-byte vectors. ---- */

template <int TYPE>
OZ_DEVICE uint4 averaged(uint4 m, uint4 g, const Rule &r, float sign) {
  constexpr int N = Vector<TYPE>::COUNT;
  float x[N], y[N];
  unpack<TYPE>(m, x);
  unpack<TYPE>(g, y);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = averaged(x[i], sign * y[i], r);
  return pack<TYPE>(x);
}

enum Followed { GRADIENT, MOMENTUM, NESTEROV };

/* The row comes to be held; with momentum it is the momentum that is, as it is stored. */
template <int TYPE, Followed WHAT, class Held>
OZ_DEVICE void hold(const Slot &t, const Rule &r, float sign, const Place &place, Held &held) {
#pragma unroll 1
  for (int b = 0; b < held.batches(); ++b) {
    uint4 g[BATCH];
    place.load(g, t.grad, b);
    if constexpr (WHAT != GRADIENT) {
      uint4 m[BATCH];
      place.load(m, t.exp_avg, b);
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        g[i] = averaged<TYPE>(m[i], g[i], r, sign);
        place.store(t.exp_avg, b, i, g[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) held.at(b, i) = g[i];
  }
}

/* A vector of what the step follows, from what is held; of the gradient without its sign. To look
 * ahead takes the gradient once more, from a cache: registers do not hold it beside the momentum. */
template <int TYPE, Followed WHAT>
OZ_DEVICE void unpack_followed(const Slot &t, const Rule &r, float sign, const Place &place,
                               int batch, int i, uint4 held, float *x) {
  unpack<TYPE>(held, x);
  if constexpr (WHAT == NESTEROV) {
    constexpr int N = Vector<TYPE>::COUNT;
    float g[N];
    unpack<TYPE>(place.load(t.grad, batch, i), g);
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = averaged(x[k], sign * g[k], r);
  }
}

template <int TYPE, Followed WHAT, class Held>
OZ_DEVICE float sum_of_squares(const Slot &t, const Rule &r, float sign, const Place &place,
                               Held &held, float sum) {
  constexpr int N = Vector<TYPE>::COUNT;
  const float scale = WHAT == GRADIENT ? sign : 1.0f;
#pragma unroll 1
  for (int b = 0; b < held.batches(); ++b) {
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      float x[N];
      unpack_followed<TYPE, WHAT>(t, r, sign, place, b, i, held.at(b, i), x);
#pragma unroll
      for (int k = 0; k < N; ++k) sum = fmaf(scale * x[k], scale * x[k], sum);
    }
  }
  return sum;
}

template <int TYPE, Followed WHAT>
OZ_DEVICE void step_vector(const Slot &t, const Rule &r, const Scalars &s, const Place &place,
                           int batch, int i, uint4 p, uint4 held, float by) {
  constexpr int N = Vector<TYPE>::COUNT;
  float x[N], y[N];
  unpack_followed<TYPE, WHAT>(t, r, s.sign, place, batch, i, held, x);
  unpack<TYPE>(p, y);
  const int64_t at = (place.first + turn_at(batch, i)) * N;
#pragma unroll
  for (int k = 0; k < N; ++k) y[k] = stepped<false>(y[k], x[k], by, t, s);
  round_results(y, TYPE, t, r, at);
  place.store(t.param, batch, i, pack<TYPE>(y));
}

/* ---- One element, of any types. ---- */

OZ_DEVICE float direction(const Slot &t, const Rule &r, int grad_type, int state_type,
                          Followed what, float sign, int64_t at, bool update) {
  const float g = what != MOMENTUM || update ? sign * get(t.grad, at, grad_type) : 0.0f;
  if (what == GRADIENT) return g;
  float m = get(t.exp_avg, at, state_type);
  if (update) {
    m = averaged(m, g, r);
    put(t.exp_avg, at, state_type, m);
    m = nearest(m, state_type);
  }
  return what == NESTEROV ? averaged(m, g, r) : m;
}

template <bool CAUTIOUS>
OZ_DEVICE void step_element(const Slot &t, const Rule &r, const Scalars &s, int type, int64_t at,
                            float x, float by) {
  float p[1] = {stepped<CAUTIOUS>(get(t.param, at, type), x, by, t, s)};
  round_results(p, type, t, r, at);
  put(t.param, at, type, p[0]);
}

template <int TYPE, Followed WHAT, bool ODD, class Held>
OZ_DEVICE void step_row(const Slot &t, const Rule &r, const Team &team, int64_t row, Held &held) {
  const Scalars s = scalars_of(t, r);
  const Place place = place_of(t, row, team, Vector<TYPE>::COUNT);
  const int64_t edge = ODD ? edge_of(t, row, team, Vector<TYPE>::COUNT) : -1;
  float square = 0.0f;
  if (edge >= 0) {
    const float x = direction(t, r, TYPE, TYPE, WHAT, s.sign, edge, true);
    square = x * x;
  }
  uint4 p[BATCH];
  hold<TYPE, WHAT>(t, r, s.sign, place, held);
  /* In flight while the gradient comes in and is added up; to look ahead takes these registers. */
  constexpr bool EARLY = WHAT != NESTEROV || !Held::REGISTERS;
  if (EARLY) place.load(p, t.param, 0);
  const float sum = team_sum(team, sum_of_squares<TYPE, WHAT>(t, r, s.sign, place, held, square));
  const float scale = WHAT == GRADIENT ? s.sign : 1.0f, by = factor(sum, t, r) * scale;
#pragma unroll 1
  for (int b = 0; b < held.batches(); ++b) {
    if (EARLY && b > 0) place.load(p, t.param, b);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (!EARLY) p[i] = place.load(t.param, b, i);
      const uint4 x = EARLY ? held.at(b, i) : place.load(t.exp_avg, b, i);
      step_vector<TYPE, WHAT>(t, r, s, place, b, i, p[i], x, by);
    }
  }
  if (edge >= 0) {
    const float sign = WHAT == GRADIENT ? 1.0f : s.sign; /* or it comes with the factor */
    const float x = direction(t, r, TYPE, TYPE, WHAT, sign, edge, false);
    step_element<false>(t, r, s, TYPE, edge, x, by);
  }
}

template <int TYPE, bool ODD, class Held>
OZ_DEVICE void step_any_row(const Slot &t, const Rule &r, const Team &team, int64_t row,
                            Held &held) {
  constexpr bool FITS = !ODD || !Held::REGISTERS; /* see way_of */
  if (!t.exp_avg)
    step_row<TYPE, GRADIENT, ODD>(t, r, team, row, held);
  else if (FITS && r.nesterov)
    step_row<TYPE, FITS ? NESTEROV : MOMENTUM, ODD>(t, r, team, row, held);
  else
    step_row<TYPE, MOMENTUM, ODD>(t, r, team, row, held);
}

template <int TYPE, bool ODD>
OZ_DEVICE void held_row(const Slot &t, const Rule &r, uint32_t unit) {
  const Team team = team_of(t.team, static_cast<int>(threadIdx.x));
  InRegisters held;
  step_any_row<TYPE, ODD>(t, r, team, row_of(team, unit), held);
}

/* ---- Rows of any types and alignments, by element; the second reading hits a cache. ---- */

/* run(index) for the elements of a thread's row, those of the vectors of `held_row` in its order. */
template <typename Run>
OZ_DEVICE void for_elements(const Slot &t, const Team &team, int64_t row, Run run) {
  if (row >= t.rows) return;
  const int turn = turn_of(t.grad_type);
  const Cut cut = cut_of(row, t.cols, turn);
  const int64_t edge = edge_of(t, row, team, turn);
  if (edge >= 0) run(edge);
  for (int64_t b = 0; b < batches_of(cut.vectors); ++b)
    for (int i = 0; i < BATCH; ++i) {
      const int64_t at = first_turn(team) + turn_at(b, i);
      if (at >= cut.vectors) break;
      for (int k = 0; k < turn; ++k) run(cut.begin + cut.head + at * turn + k);
    }
}

OZ_DEVICE void any_row(const Slot &t, const Rule &r, uint32_t unit) {
  const Scalars s = scalars_of(t, r);
  const Team team = team_of(t.team, static_cast<int>(threadIdx.x));
  const int64_t row = row_of(team, unit);
  const Followed what = !t.exp_avg ? GRADIENT : r.nesterov ? NESTEROV : MOMENTUM;
  const auto x_at = [&](int64_t at, bool update) {
    return direction(t, r, t.grad_type, t.state_type, what, s.sign, at, update);
  };
  float sum = 0.0f;
  for_elements(t, team, row, [&](int64_t at) {
    const float x = x_at(at, true);
    sum = fmaf(x, x, sum);
  });
  const float by = factor(team_sum(team, sum), t, r);
  for_elements(t, team, row, [&](int64_t at) {
    step_element<true>(t, r, s, t.param_type, at, x_at(at, false), by);
  });
}

/* ---- Signs: eight elements a thread. ---- */

OZ_DEVICE void sign_unit(const Slot &t, const Rule &r, uint32_t unit) {
  const Scalars s = scalars_of(t, r);
  const int64_t at = first_element(unit);
  const int64_t count = t.cols - at;
  if (count <= 0) return;
  float g[EIGHT], p[EIGHT];
  const Eight raw_g = load(t.grad, at, count, t.grad_type, t.wide);
  const Eight raw_p = load(t.param, at, count, t.param_type, t.wide);
  unpack(raw_g, t.grad_type, g);
#pragma unroll
  for (int i = 0; i < EIGHT; ++i) g[i] *= s.sign;
  if (t.exp_avg) {
    float m[EIGHT];
    unpack(load(t.exp_avg, at, count, t.state_type, t.wide), t.state_type, m);
#pragma unroll
    for (int i = 0; i < EIGHT; ++i) m[i] = averaged(m[i], g[i], r);
    store(t.exp_avg, at, count, t.state_type, t.wide, m);
#pragma unroll
    for (int i = 0; i < EIGHT; ++i) g[i] = followed(nearest(m[i], t.state_type), g[i], r);
  }
  unpack(raw_p, t.param_type, p);
#pragma unroll
  for (int i = 0; i < EIGHT; ++i) p[i] = stepped<true>(p[i], sign_of(g[i]), 1.0f, t, s);
  round_results(p, t.param_type, t, r, at);
  store(t.param, at, count, t.param_type, t.wide, p);
}

// budget: scale_rows 64 LDG.E.128 STG.E.128
template <typename Table>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    scale_rows(const Table __grid_constant__ table) {
  in_turn();
  const Rule &r = table.rule;
  if (skipped(r)) return;
  for_each_unit(table, [&](const Slot &t, uint32_t unit, bool) {
    if (t.kind == OZ_ADAM) {
      adam_unit(t, r, correction_of(t, r, true), unit);
    } else if (t.kind == OZ_SIGN) {
      sign_unit(t, r, unit);
    } else if (!t.wide) {
      any_row(t, r, unit);
    } else if (t.param_type == OZ_F32) {
      held_row<OZ_F32, false>(t, r, unit);
    } else if (t.param_type == OZ_BF16) {
      held_row<OZ_BF16, false>(t, r, unit);
    } else {
      held_row<OZ_F16, false>(t, r, unit);
    }
  });
}

/* Rows that begin anywhere: on their own, as with all else the registers would not do. */
// budget: scale_odd_rows 64 LDG.E.128 STG.E.128
template <typename Table>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    scale_odd_rows(const Table __grid_constant__ table) {
  in_turn();
  const Rule &r = table.rule;
  if (skipped(r)) return;
  for_each_unit(table, [&](const Slot &t, uint32_t unit, bool) {
    if (t.param_type == OZ_F32)
      held_row<OZ_F32, true>(t, r, unit);
    else if (t.param_type == OZ_BF16)
      held_row<OZ_BF16, true>(t, r, unit);
    else
      held_row<OZ_F16, true>(t, r, unit);
  });
}

template <int TYPE>
OZ_DEVICE void long_row(const Slot &t, const Rule &r, uint32_t row, uint4 *shared) {
  const Team team = team_of(THREADS, static_cast<int>(threadIdx.x));
  const int batches = static_cast<int>(batches_of(t.cols / Vector<TYPE>::COUNT));
  InShared held = {shared + team.lane, batches};
  step_any_row<TYPE, true>(t, r, team, row, held);
}

// budget: scale_long_rows 64 LDG.E.128 STG.E.128
template <typename Table>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    scale_long_rows(const Table __grid_constant__ table) {
  in_turn();
  uint4 *shared = dynamic_shared();
  const Rule &r = table.rule;
  if (skipped(r)) return;
  for_each_unit(table, [&](const Slot &t, uint32_t unit, bool) {
    if (t.param_type == OZ_F32)
      long_row<OZ_F32>(t, r, unit, shared);
    else if (t.param_type == OZ_BF16)
      long_row<OZ_BF16>(t, r, unit, shared);
    else
      long_row<OZ_F16>(t, r, unit, shared);
  });
}

/* ---- Columns. ---- */

// budget: scale_column_sums 64 LDG.E.128 STG.E.128
template <typename Table>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    scale_column_sums(const Table __grid_constant__ table) {
  in_turn();
  const Rule &r = table.rule;
  if (skipped(r)) return;
  for_each_unit(table, [&](const Slot &t, uint32_t unit, bool) {
    column_sums<true>(t, r, gradient_sign(r), unit, t.extra);
  });
}

// budget: scale_column_update 64 LDG.E.128 STG.E.128
template <typename Table>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    scale_column_update(const Table __grid_constant__ table) {
  in_turn();
  const Rule &r = table.rule;
  if (skipped(r)) return;
  for_each_unit(table, [&](const Slot &t, uint32_t unit, bool) {
    column_update(t, r, unit);
  });
}

/* ---- The host's side. ---- */

/* Bytes of shared memory for a row that is too long for a block's registers, else 0. */
int64_t long_bytes(const oz_tensor &t) {
  const int64_t batches = batches_of(t.cols / turn_of(t.grad_type));
  return batches > 1 ? batches * BATCH * THREADS * int64_t{sizeof(uint4)} : 0;
}

enum Way { HELD, ODD, SHARED, BY_ELEMENT };

/* How a tensor's rows are read; `room` is a block's shared memory. By element: cautious decay, and of
 * rows that begin anywhere Nesterov's momentum, for which the registers would not do. */
Way way_of(const oz_tensor &t, int64_t room, bool nesterov) {
  const bool one_type =
      t.param_type == t.grad_type && (!t.exp_avg || t.state_type == t.grad_type);
  if (!one_type || !wide(t, 1) || long_bytes(t) > room || t.weight_decay < 0) return BY_ELEMENT;
  if (long_bytes(t) > 0) return SHARED;
  if (t.cols % turn_of(t.grad_type) == 0) return HELD;
  return nesterov && t.exp_avg ? BY_ELEMENT : ODD;
}

cudaError_t scale(const oz_tensor *tensors, int64_t count, const oz_options &o,
                  cudaStream_t stream) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const int64_t room = most - 1024; /* for what the kernel itself and the system take */
  const auto in_teams = [](Slot &slot, const oz_tensor &t) {
    slot.team = static_cast<uint16_t>(team_size(t.cols, turn_of(t.grad_type)));
    return row_units(t.rows, slot.team);
  };
  Launch how = {stream};
  how.overlapped = true;
  error = for_tables(
      tensors, count, o,
      [&](Slot &slot, const oz_tensor &t) -> int64_t {
        if (t.kind == OZ_ADAM || t.kind == OZ_SIGN) return cut_elements(slot, t);
        const Way way = way_of(t, room, o.nesterov);
        if (t.kind != OZ_ROWS || way == ODD || way == SHARED) return 0;
        slot.wide = way == HELD;
        return in_teams(slot, t);
      },
      [&](const Table &table) { return launch(scale_rows<FewTable>, scale_rows<Table>, table, how); });
  if (error != cudaSuccess) return error;
  error = for_tables(
      tensors, count, o,
      [&](Slot &slot, const oz_tensor &t) {
        return t.kind == OZ_ROWS && way_of(t, room, o.nesterov) == ODD ? in_teams(slot, t) : 0;
      },
      [&](const Table &table) { return launch(scale_odd_rows<FewTable>, scale_odd_rows<Table>, table, how); });
  if (error != cudaSuccess) return error;
  const auto in_shared = [&](const oz_tensor &t) {
    return t.kind == OZ_ROWS && way_of(t, room, o.nesterov) == SHARED;
  };
  Launch long_how = how;
  for (int64_t i = 0; i < count; ++i)
    if (in_shared(tensors[i])) long_how.shared = std::max(long_how.shared, long_bytes(tensors[i]));
  if (long_how.shared > 0) {
    const int bytes = static_cast<int>(long_how.shared);
    error = cudaFuncSetAttribute(scale_long_rows<FewTable>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(scale_long_rows<Table>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    error = for_tables(
        tensors, count, o,
        [&](Slot &, const oz_tensor &t) { return in_shared(t) ? t.rows : 0; },
        [&](const Table &table) { return launch(scale_long_rows<FewTable>, scale_long_rows<Table>, table, long_how); });
    if (error != cudaSuccess) return error;
  }
  const auto cut_columns = [](Slot &, const oz_tensor &t) {
    return t.kind == OZ_COLUMNS ? column_units(t.rows, t.cols) : 0;
  };
  error = for_tables(tensors, count, o, cut_columns,
                     [&](const Table &table) { return launch(scale_column_sums<FewTable>, scale_column_sums<Table>, table, how); });
  if (error != cudaSuccess) return error;
  return for_tables(tensors, count, o, cut_columns,
                    [&](const Table &table) { return launch(scale_column_update<FewTable>, scale_column_update<Table>, table, how); });
}

}  // namespace

int oz_cuda_abi(void) { return OZ_ABI; }

int oz_cuda_toolkit(void) { return CUDART_VERSION; }

int oz_cuda_driver(void) {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int oz_cuda_architectures(int *out, int size) {
  const int built[] = {__CUDA_ARCH_LIST__};
  const int count = sizeof(built) / sizeof(built[0]);
  for (int i = 0; i < count && i < size; ++i) out[i] = built[i] / 10;
  return count;
}

int64_t oz_cuda_scale_scratch(int64_t rows, int64_t cols) {
  return chunks_of(rows, cols) * cols * int64_t{sizeof(float)};
}

int oz_cuda_scale(const oz_tensor *tensors, int64_t count, const oz_options *options,
                  void *stream) {
  return scale(tensors, count, *options, static_cast<cudaStream_t>(stream));
}
