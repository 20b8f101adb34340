/* The update kernels' plain C interface: pointers, sizes, a stream. No torch headers.
 *
 * One call takes every tensor of an optimizer, each with a learning rate and a decay of its own. The
 * CPU library (csrc/cpu) and the CUDA library (csrc/cuda) export the same functions, with the prefix
 * oz_cpu_ or oz_cuda_; the Python side of these structures is optimzoo/kernels/native.py. OZ_ABI is
 * checked when a library is loaded, by optimzoo/kernels/library.py.
 *
 * Every tensor is a dense row-major matrix [rows, cols]; a vector is [1, n]. All arithmetic is in
 * float32; what is stored is rounded once, to nearest (ties to even) or stochastically. Any of the
 * pointers may have the alignment of its element only. Empty tensors are skipped.
 *
 * Functions return 0, or a cudaError_t; `stream` is a cudaStream_t (ignored on the CPU).
 */
#ifndef OPTIMZOO_H
#define OPTIMZOO_H

#include <stdint.h>

#define OZ_ABI 10

#ifdef __cplusplus
extern "C" {
#endif

enum oz_type { OZ_F32 = 0, OZ_BF16 = 1, OZ_F16 = 2 };

/* How SCALE treats a tensor: one divisor a row (reduces dim 1), one a column (reduces dim 0), the
 * sign, or Adam. */
enum oz_kind { OZ_ROWS = 0, OZ_COLUMNS = 1, OZ_SIGN = 2, OZ_ADAM = 3 };

enum oz_rounding { OZ_NEAREST = 0, OZ_STOCHASTIC = 1 };

/* 104 bytes: no implicit padding. */
typedef struct oz_tensor {
  void *param;         /* read and written (oz_*_reduce: not used) */
  const void *grad;    /* read only */
  void *exp_avg;       /* NULL: no first moment */
  void *exp_avg_sq;    /* NULL: no second moment */
  const uint8_t *mask; /* packed N:M mask, 1 = kept, element e is bit e % 8 of byte e / 8; or NULL */
  const float *step;   /* Adam's count, this step included, as float32 where the tensors live */
  void *extra;         /* float32: scratch, results or channel scales, as the function says; or NULL */
  const float *lr_tensor; /* not NULL: read instead of lr, where the tensors live */
  int64_t rows, cols;
  float lr, weight_decay; /* weight_decay < 0: cautious, see below */
  int32_t param_type, grad_type, state_type; /* enum oz_type; state_type is of both moments */
  int32_t kind;                              /* enum oz_kind */
} oz_tensor;

/* No implicit padding; what a function does not name it does not read. */
typedef struct oz_options {
  double momentum, eps;                   /* SCALE: beta of the head, floor of the divisor */
  double beta1, beta2, adam_eps;          /* Adam */
  double l1, alpha;                       /* AdamS: strength and ramp of the decay of masked weights */
  double max_update;                      /* Adam: if > 0, u is clamped to [-max_update, max_update] */
  const float *grad_scale;                /* not NULL: gradients are divided by it */
  const float *found_inf;                 /* not NULL and not 0: nothing at all is written */
  uint64_t seed, step;                    /* of stochastic rounding */
  uint32_t first_index;                   /* of stochastic rounding: tensor i counts as first_index + i */
  int32_t l2;                             /* SCALE: divide by the norm, not by the root mean square */
  int32_t maximize;                       /* negate the gradients */
  int32_t rounding;                       /* enum oz_rounding, of params only; moments go to nearest */
  int32_t eps_before;                     /* Adam's eps is added before (1) or after (0) the bias
                                             correction of the second moment */
  int32_t direction;                      /* Adam: param receives m / (sqrt(v) + eps), no step taken */
  int32_t threads;                        /* CPU */
  int32_t nesterov;                       /* SCALE: look ahead, see below */
  int32_t iterations;                     /* CPU, SinkGD */
  int32_t reserved;
} oz_options;

/* What every function does first, element by element:
 *     g = float(grad) / grad_scale, negated if maximize.
 *
 * SCALE, by tensor.kind, with b = momentum, n = the number of elements reduced over:
 *     if exp_avg:  m = m + (1 - b) (g - m), stored rounded to state_type; g = m as it is stored
 *                  and with nesterov  g = m + (1 - b) (g0 - m), g0 the gradient
 *     OZ_ROWS      s_i = max(sqrt(sum_j g_ij^2 / n), eps)        (l2: without / n)
 *     OZ_COLUMNS   s_j = max(sqrt(sum_i g_ij^2 / n), eps)        (l2: without / n)
 *     OZ_SIGN      u = sign(g), instead of u = g / s
 *     param = param - lr (g / s + weight_decay param)
 *     OZ_ADAM      as oz_*_adam with eps_before = 1
 * A row (column) of zeros is not moved but by the decay. A negative weight_decay is cautious: all
 * functions take |weight_decay| where (what is subtracted beside the decay) * param >= 0, and 0
 * elsewhere. `extra` is not used on the CPU; on CUDA,
 * OZ_COLUMNS needs `extra`: float32 scratch of oz_cuda_scale_scratch(rows, cols) bytes.
 *
 * Adam, AdamW and AdamS, with t = *step:
 *     m = m + (1 - beta1) (g - m)
 *     without mask:  mt = m;  v = v + (1 - beta2) (g^2 - v)
 *     with mask:     mt = kept ? m : (1 - alpha) m + alpha l1 sign(param);  v = v + (1-beta2)(mt^2 - v)
 *     c1 = 1 - beta1^t, c2 = 1 - beta2^t
 *     eps_before = 0:  u = (mt / c1) / (sqrt(v / c2) + adam_eps)
 *     eps_before = 1:  u = (sqrt(c2) / c1) mt / (sqrt(v) + adam_eps)
 *     param = param - lr (u + weight_decay param)
 *     if extra (3 floats, Stable-SPAM's clipping): first g = extra[2] c(g), c with bound extra[0] and
 *     ratio extra[1], as under oz_*_reduce
 *     direction = 1:   u = param = mt / (sqrt(v) + adam_eps); step may be NULL; lr, decay are not used
 *     max_update > 0:  u = min(max(u, -max_update), max_update); NaN stays NaN
 * u is computed from m and v before they are rounded for storage.
 *
 * Stochastic rounding of element e (its index in [rows, cols]) of tensor i, bit-equal on every
 * backend and in optimzoo/lowbit/stochastic.py; all uint32, h = the 32-bit finaliser of MurmurHash3:
 *     key  = h(lo(seed) ^ h(hi(seed) ^ h(lo(step) ^ h(hi(step) ^ h(first_index + i)))))
 *     bits = h(lo(e) ^ h(hi(e) ^ key))
 *     bfloat16: x's float32 bits + (bits & 0xffff), then the low 16 bits are cut off
 *     float16, |x| >= 2^-14: x's bits + (bits & 0x1fff), low 13 bits cut off, then converted
 *     float16, |x| <  2^-14: floor(|x| 2^24 + (bits >> 8) 2^-24) 2^-24, with x's sign
 *     float32, and whatever is not finite: as to nearest
 */
int oz_cpu_abi(void);

/* 0: built by a compiler without OpenMP, every call runs in one thread. */
int oz_cpu_threaded(void);

int oz_cpu_scale(const oz_tensor *tensors, int64_t count, const oz_options *options, void *stream);
int oz_cpu_adam(const oz_tensor *tensors, int64_t count, const oz_options *options, void *stream);

/* Sums that the channel-scaling methods need, into `extra` (float32), each from one pass over grad:
 *     OZ_ROWS     extra[i] = sum_j g_ij^2                            (rows floats)
 *     OZ_COLUMNS  extra[j] = sum_i g_ij^2                            (cols floats)
 *     OZ_SIGN     extra[0] = max |g|, extra[1] = sum of c(g)^2       (4 floats)
 * where c clips as Stable-SPAM does, by what the caller put into extra[2] (bound) and extra[3]
 * (ratio): c(g) = ratio g where |g| > bound > 0, else g. */
int oz_cpu_reduce(const oz_tensor *tensors, int64_t count, const oz_options *options, void *stream);

/* param = (1 - lr weight_decay) param - lr s g, with s = extra[i] (OZ_ROWS), extra[j] (OZ_COLUMNS) or
 * extra[0] (OZ_SIGN). */
int oz_cpu_apply(const oz_tensor *tensors, int64_t count, const oz_options *options, void *stream);

/* SWAN's row statistics: param_ij = (g_ij - mean_j g_ij) / max(std_j g_ij, eps), std over n. param
 * is an output here, and never read. */
int oz_cpu_center(const oz_tensor *tensors, int64_t count, const oz_options *options, void *stream);

/* SinkGD, on the CPU, and in Triton's kernels: X = g, then `iterations` times
 *     X_ij = X_ij / max(sqrt(sum_k X_ik^2 / cols), FLT_MIN)        each row
 *     X_ij = X_ij / max(sqrt(sum_k X_kj^2 / rows), FLT_MIN)        each column
 * by OZ_ROWS; by OZ_COLUMNS, for a weight that lies transposed, each iteration has the columns first.
 *     param = param - lr (X + weight_decay param)
 * No element of X is stored, and the result does not depend on the threads. */
int oz_cpu_sinkhorn(const oz_tensor *tensors, int64_t count, const oz_options *options,
                    void *stream);

/* Natural GaLore's passes over its history [rows, cols] of enum oz_type `type` (float32 or bfloat16),
 * on the CPU only; `vector` is of that type too:
 *     dot:      out[i] = sum_j history[i, j] vector[j]       (rows floats)
 *     combine:  out[j] = sum_i weights[i] history[i, j]      (cols floats) */
int oz_cpu_history_dot(const void *history, const void *vector, float *out, int64_t rows,
                       int64_t cols, int32_t type, int32_t threads);
int oz_cpu_history_combine(const void *history, const float *weights, float *out, int64_t rows,
                           int64_t cols, int32_t type, int32_t threads);

/* The N:M mask of a weight [rows, cols] of enum oz_type `type`, on the CPU only: mask[i, e / 8] has
 * bit e % 8 set where |weight_ie| is one of the n largest of its group of m consecutive columns (of
 * equal ones the lower index, NaN as infinite). m is 2, 4 or 8 and divides cols; a row of the mask has
 * ceil(cols / 8) bytes, the bits behind its end 0. */
int oz_cpu_nm_mask(const void *weight, uint8_t *mask, int64_t rows, int64_t cols, int32_t type,
                   int32_t n, int32_t m, int32_t threads);

int oz_cuda_abi(void);

/* What the library was built with and for, and what this machine's driver can run; none needs a GPU.
 * Versions as CUDA writes them, 13000 for 13.0; the driver's is 0 where there is none. Architectures:
 * their number, and the first `size` of them, 90 for sm_90, in out. */
int oz_cuda_toolkit(void);
int oz_cuda_driver(void);
int oz_cuda_architectures(int *out, int size);

int64_t oz_cuda_scale_scratch(int64_t rows, int64_t cols);
int oz_cuda_scale(const oz_tensor *tensors, int64_t count, const oz_options *options, void *stream);
int oz_cuda_adam(const oz_tensor *tensors, int64_t count, const oz_options *options, void *stream);
int oz_cuda_reduce(const oz_tensor *tensors, int64_t count, const oz_options *options, void *stream);
int oz_cuda_apply(const oz_tensor *tensors, int64_t count, const oz_options *options, void *stream);
int oz_cuda_center(const oz_tensor *tensors, int64_t count, const oz_options *options, void *stream);

#ifdef __cplusplus
}
#endif
#endif
