/* What a launch is told: a table of tensors, by value in the kernel's arguments, so that nothing is
 * copied to the device beforehand and a captured graph keeps its own. */
#ifndef OZ_CUDA_TABLE_CUH
#define OZ_CUDA_TABLE_CUH

#include <algorithm>
#include <cmath>

#include "types.cuh"

constexpr int THREADS = 512; /* a block; two of them share a multiprocessor, at 64 registers each */
constexpr int BLOCKS = 2;
constexpr int WARP = 32, WARPS = THREADS / WARP;
constexpr int64_t ELEMENTS = int64_t{THREADS} * EIGHT; /* a unit, where rows do not matter */

/* The options, as kernels read them. */
struct Rule {
  const float *grad_scale, *found_inf;
  float sign;
  float rest, floor, most;                            /* SCALE: 1 - momentum, eps^2, 1 / eps */
  float rest1, rest2, log_beta1, log_beta2, adam_eps; /* Adam: 1 - beta, ln beta */
  float alpha, pull;                                  /* AdamS: pull = alpha l1 */
  float limit;                                        /* Adam: of |u|; infinite: none */
  bool stochastic, eps_before, direction, nesterov;
};

/* A tensor, with how its work is cut up. */
struct Slot {
  void *param;
  const void *grad;
  void *exp_avg, *exp_avg_sq;
  const uint8_t *mask;
  const float *step;
  float *extra;
  const float *lr_tensor;
  int64_t rows, cols;
  float lr, decay;
  float share;   /* 1 / n of the elements that a mean is over, or 1 with l2 */
  uint32_t key;  /* of stochastic rounding */
  uint16_t team; /* threads that share a row */
  uint8_t param_type, grad_type, state_type, kind;
  bool wide; /* rows begin at multiples of 16 bytes in every tensor that is used */
};

constexpr size_t ARGUMENT_BYTES = 32764; /* of a kernel, from sm_70 and CUDA 12.1 on */
constexpr int SLOTS =
    static_cast<int>((ARGUMENT_BYTES - sizeof(Rule) - 16) / (sizeof(Slot) + sizeof(uint32_t)));
constexpr int FEW_SLOTS = 20;

/* Unit u belongs to the slot i with start[i] <= u < start[i + 1]. */
template <int MOST>
struct TableOf {
  static constexpr int SIZE = MOST;
  Rule rule;
  int count;
  uint32_t start[MOST + 1];
  Slot slots[MOST];
};
using Table = TableOf<SLOTS>;
using FewTable = TableOf<FEW_SLOTS>; /* all of a table goes along with each launch */
static_assert(sizeof(Table) <= ARGUMENT_BYTES, "the table exceeds a kernel's arguments");

OZ_BOTH int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* ---- The device's side. ---- */

/* The slot of a unit; `guess` is that of the unit before. */
template <typename Table>
OZ_BOTH int slot_of(const Table &table, uint32_t unit, int guess) {
  if (unit < table.start[guess + 1]) return guess;
  int from = guess + 1, to = table.count; /* it lies in [from, to) */
  while (to - from > 1) {
    const int middle = (from + to) / 2;
    if (unit < table.start[middle])
      to = middle;
    else
      from = middle;
  }
  return from;
}

/* run(slot, unit of the slot, whether the slot is another than before) for this block's units. */
template <typename Table, typename Run>
OZ_DEVICE void for_each_unit(const Table &table, Run run) {
  const uint32_t units = table.start[table.count];
  int last = -1;
  for (uint32_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int i = slot_of(table, unit, last < 0 ? 0 : last);
    run(table.slots[i], unit - table.start[i], i != last);
    last = i;
  }
}

/* A thread's first element in a unit of ELEMENTS, which is a power of two. */
OZ_DEVICE int64_t first_element(uint32_t unit) {
  return unit * ELEMENTS | threadIdx.x * EIGHT;
}

/* At a kernel's beginning: the next may come to its own beginning, and this one goes on when all
 * before it has ended. What a launch takes is then hidden behind the last blocks of the kernel
 * before. */
OZ_DEVICE void in_turn() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

OZ_DEVICE bool skipped(const Rule &r) { return r.found_inf && *r.found_inf != 0.0f; }

/* Asked for in every unit again: kept through a kernel they would cost registers. */
struct Scalars {
  float lr, sign; /* sign: of a gradient, and its scale */
};

OZ_DEVICE float gradient_sign(const Rule &r) {
  return r.grad_scale ? r.sign / *r.grad_scale : r.sign;
}

OZ_DEVICE Scalars scalars_of(const Slot &t, const Rule &r) {
  return {t.lr_tensor ? *t.lr_tensor : t.lr, gradient_sign(r)};
}

/* By how much p decays. A negative decay is cautious: not where the update u moves p away from zero. */
OZ_DEVICE float decay_at(float decay, float p, float u) {
  return fmaxf(u * p >= 0.0f ? fabsf(decay) : decay, 0.0f);
}

/* Results for the parameter's N elements from `at` on, before they are stored to nearest. */
template <int N>
OZ_DEVICE void round_results(float (&x)[N], int type, const Slot &t, const Rule &r, int64_t at) {
  if (type == OZ_F32 || !r.stochastic) return;
  uint32_t inner = hashed(high(static_cast<uint64_t>(at)) ^ t.key);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint64_t element = static_cast<uint64_t>(at + i);
    if (at % N != 0) inner = hashed(high(element) ^ t.key); /* else they agree in the upper half */
    x[i] = stochastic(x[i], type, hashed(low(element) ^ inner));
  }
}

/* ---- The host's side. ---- */

inline Rule rule_of(const oz_options &o) {
  Rule r = {};
  r.grad_scale = o.grad_scale;
  r.found_inf = o.found_inf;
  r.sign = o.maximize ? -1.0f : 1.0f;
  r.rest = static_cast<float>(1.0 - o.momentum);
  r.floor = static_cast<float>(o.eps * o.eps);
  r.most = static_cast<float>(std::min(1.0 / o.eps, 1e30)); /* times zero it is zero */
  r.rest1 = static_cast<float>(1.0 - o.beta1);
  r.rest2 = static_cast<float>(1.0 - o.beta2);
  r.log_beta1 = static_cast<float>(std::log(o.beta1));
  r.log_beta2 = static_cast<float>(std::log(o.beta2));
  r.adam_eps = static_cast<float>(o.adam_eps);
  r.alpha = static_cast<float>(o.alpha);
  r.pull = static_cast<float>(o.alpha * o.l1);
  r.limit = o.max_update > 0 ? static_cast<float>(o.max_update) : INFINITY;
  r.stochastic = o.rounding == OZ_STOCHASTIC;
  r.eps_before = o.eps_before != 0;
  r.direction = o.direction != 0;
  r.nesterov = o.nesterov != 0;
  return r;
}

OZ_BOTH uint32_t rounding_key(const oz_options &o, int64_t tensor) {
  const uint32_t index = o.first_index + static_cast<uint32_t>(tensor);
  const uint32_t inner = hashed(low(o.step) ^ hashed(high(o.step) ^ hashed(index)));
  return hashed(low(o.seed) ^ hashed(high(o.seed) ^ inner));
}

OZ_BOTH bool aligned(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

/* Whether 16-byte accesses work on `each` elements at a time, counted from a row's beginning. */
inline bool wide(const oz_tensor &t, int64_t each) {
  return (t.rows == 1 || t.cols % each == 0) && aligned(t.param) && aligned(t.grad) &&
         aligned(t.exp_avg) && aligned(t.exp_avg_sq);
}

inline Slot slot_of(const oz_tensor &t, const oz_options &o, int64_t index) {
  Slot s = {t.param, t.grad, t.exp_avg, t.exp_avg_sq, t.mask, t.step, static_cast<float *>(t.extra)};
  s.lr_tensor = t.lr_tensor;
  s.rows = t.rows;
  s.cols = t.cols;
  s.lr = t.lr;
  s.decay = t.weight_decay;
  s.share = 1.0f;
  s.key = rounding_key(o, index);
  if (!o.l2) s.share = 1.0f / static_cast<float>(t.kind == OZ_COLUMNS ? t.rows : t.cols);
  s.team = THREADS;
  s.param_type = static_cast<uint8_t>(t.param_type);
  s.grad_type = static_cast<uint8_t>(t.grad_type);
  s.state_type = static_cast<uint8_t>(t.state_type);
  s.kind = static_cast<uint8_t>(t.kind);
  s.wide = wide(t, EIGHT);
  return s;
}

/* A vector of all elements: where its rows are does not matter. */
inline int64_t cut_elements(Slot &slot, const oz_tensor &t) {
  slot.rows = 1;
  slot.cols = t.rows * t.cols;
  slot.wide = wide(t, 1);
  return ceil_div(slot.cols, ELEMENTS);
}

/* How a kernel is launched. */
struct Launch {
  cudaStream_t stream;
  int threads = THREADS, per_multiprocessor = BLOCKS;
  int64_t shared = 0;      /* bytes */
  bool overlapped = false; /* the kernel begins with in_turn(): see there */
};

template <typename Kernel, typename Table>
inline cudaError_t launch(Kernel *kernel, const Table &table, const Launch &how) {
  int device = 0, multiprocessors = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  const uint32_t most = static_cast<uint32_t>(multiprocessors * how.per_multiprocessor);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(std::min(table.start[table.count], most));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = static_cast<size_t>(how.shared);
  config.stream = how.stream;
  config.attrs = &overlap;
  config.numAttrs = how.overlapped && major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, table);
}

/* A launch with the smaller table, if it does. */
template <typename Few, typename Many>
inline cudaError_t launch(Few *few, Many *many, const Table &table, const Launch &how) {
  if (table.count > FEW_SLOTS) return launch(many, table, how);
  FewTable small;
  small.rule = table.rule;
  small.count = table.count;
  std::copy_n(table.start, table.count + 1, small.start);
  std::copy_n(table.slots, table.count, small.slots);
  return launch(few, small, how);
}

/* Tables of the tensors that a kernel takes, SLOTS at a time: `cut(slot, tensor)` gives a tensor's
 * number of units, 0 for one to leave out, and may set the slot; `run(table)` launches. */
template <typename Cut, typename Run>
inline cudaError_t for_tables(const oz_tensor *tensors, int64_t count, const oz_options &o, Cut cut,
                              Run run) {
  constexpr int64_t MOST_UNITS = int64_t{1} << 31;
  Table table;
  table.rule = rule_of(o);
  table.count = 0;
  table.start[0] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const oz_tensor &t = tensors[i];
    if (t.rows == 0 || t.cols == 0) continue;
    Slot slot = slot_of(t, o, i);
    const int64_t units = cut(slot, t);
    if (units == 0) continue;
    if (units > MOST_UNITS) return cudaErrorInvalidValue;
    if (table.count == SLOTS || table.start[table.count] + units > MOST_UNITS) {
      const cudaError_t error = run(table);
      if (error != cudaSuccess) return error;
      table.count = 0;
    }
    table.slots[table.count] = slot;
    table.start[table.count + 1] = table.start[table.count] + static_cast<uint32_t>(units);
    ++table.count;
  }
  return table.count == 0 ? cudaSuccess : run(table);
}

#endif
