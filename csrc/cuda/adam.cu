/* Adam, AdamW, AdamS: see optimzoo.h. */
#pragma GCC visibility push(default)
#include "optimzoo.h"
#pragma GCC visibility pop

#include "adam.cuh"

namespace {

// budget: adam_kernel 64 LDG.E.128 STG.E.128
__global__ void __launch_bounds__(THREADS, BLOCKS)
    adam_kernel(const Table __grid_constant__ table) {
  const Rule &r = table.rule;
  if (skipped(r)) return;
  Correction c = {};
  for_each_unit(table, [&](const Slot &t, uint32_t unit, bool another) {
    if (another) c = correction_of(t, r, r.eps_before);
    adam_unit(t, r, c, unit);
  });
}

}  // namespace

int oz_cuda_adam(const oz_tensor *tensors, int64_t count, const oz_options *options, void *stream) {
  const Launch how = {static_cast<cudaStream_t>(stream)};
  return for_tables(tensors, count, *options, cut_elements,
                    [&](const Table &table) { return launch(adam_kernel, table, how); });
}
