/* As much of CUDA as the kernels use, on a CPU: blocks one after the other, a block's threads as
 * fibers that change at barriers and shuffles. It finds wrong indices, missed elements and barriers
 * that some threads do not reach; with the threads in the other order (OZ_EMULATION_BACKWARDS=1)
 * also most barriers that are missing. It is no model of a GPU's speed or of its memory. */
#ifndef OZ_EMULATION_CUDA_RUNTIME_H
#define OZ_EMULATION_CUDA_RUNTIME_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define OZ_EMULATED
#define CUDART_VERSION 13000
#define __CUDA_ARCH_LIST__ 800, 900
#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__ & /* one copy for all threads */
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

/* ---- A kernel's view. ---- */

extern dim3 threadIdx, blockIdx, gridDim;
uint4 *dynamic_shared();
void __syncthreads();
uint32_t oz_exchange(uint32_t mask, uint32_t bits, int step);

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T x, int step) {
  static_assert(sizeof(T) == 4, "shuffles of four bytes");
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = oz_exchange(mask, bits, step);
  std::memcpy(&x, &bits, 4);
  return x;
}

/* ---- The host's view. ---- */

typedef struct oz_stream *cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
typedef struct oz_pool *cudaMemPool_t;
enum { cudaMemAllocationTypePinned, cudaMemLocationTypeDevice, cudaMemPoolAttrReleaseThreshold };
struct cudaMemPoolProps {
  int allocType;
  struct {
    int type, id;
  } location;
};

constexpr int OZ_SHARED_BYTES = 232448; /* an H200's */

inline cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int *version) {
  *version = 12080;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount      ? 3
           : what == cudaDevAttrComputeCapabilityMajor ? 9
                                                       : OZ_SHARED_BYTES;
  return cudaSuccess;
}
template <typename Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel *, cudaFuncAttribute, int value) {
  return value <= OZ_SHARED_BYTES ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const cudaMemPoolProps *) {
  *pool = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, int, void *) { return cudaSuccess; }
/* Filled with NaN. */
inline cudaError_t cudaMallocFromPoolAsync(void **memory, size_t bytes, cudaMemPool_t,
                                           cudaStream_t) {
  *memory = std::malloc(bytes);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xff, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void *memory, cudaStream_t) {
  std::free(memory);
  return cudaSuccess;
}

cudaError_t oz_emulate(const std::function<void()> &kernel, dim3 grid, dim3 block, size_t shared);

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute *attrs;
  unsigned numAttrs;
};

template <typename Argument>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *how,
                                      void (*kernel)(const Argument &), const Argument &argument) {
  return oz_emulate([&] { kernel(argument); }, how->gridDim, how->blockDim, how->dynamicSmemBytes);
}

#endif
