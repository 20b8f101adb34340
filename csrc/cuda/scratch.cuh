/* Device memory for the length of a call, ordered by its stream. It comes from a pool of the
 * library's own, which keeps it: the default pool hands it back whenever the host waits. */
#ifndef OZ_CUDA_SCRATCH_CUH
#define OZ_CUDA_SCRATCH_CUH

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>

inline cudaError_t scratch_pool(cudaMemPool_t *pool) {
  static std::mutex mutex;
  static std::map<int, cudaMemPool_t> pools; /* by device; they live as long as the process */
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = pools.find(device);
  if (found != pools.end()) {
    *pool = found->second;
    return cudaSuccess;
  }
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  error = cudaMemPoolCreate(pool, &properties);
  if (error != cudaSuccess) return error;
  uint64_t everything = UINT64_MAX;
  error = cudaMemPoolSetAttribute(*pool, cudaMemPoolAttrReleaseThreshold, &everything);
  if (error == cudaSuccess) pools[device] = *pool;
  return error;
}

/* run(floats), with memory for `count` of them; none if count is 0. */
template <typename Run>
inline cudaError_t with_scratch(int64_t count, cudaStream_t stream, Run run) {
  if (count == 0) return run(static_cast<float *>(nullptr));
  cudaMemPool_t pool = nullptr;
  cudaError_t error = scratch_pool(&pool);
  if (error != cudaSuccess) return error;
  void *memory = nullptr;
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
  error = cudaMallocFromPoolAsync(&memory, bytes, pool, stream);
  if (error != cudaSuccess) return error;
  const cudaError_t result = run(static_cast<float *>(memory));
  error = cudaFreeAsync(memory, stream);
  return result != cudaSuccess ? result : error;
}

#endif
