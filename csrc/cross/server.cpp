/* The CPU kernels behind a pipe, so that a build for another machine can be run and compared here, in an
 * emulator: reads calls from stdin, writes what they wrote to stdout, until stdin ends.
 *
 * A call, all in the byte order of the machine:
 *     int32   operation: 0 scale, 1 adam, 2 reduce, 3 apply, 4 center, 5 sinkhorn, 6 history_dot,
 *                        7 history_combine, 8 nm_mask
 *     int32   regions of memory; for each:
 *             int64 bytes, int32 written (1) or only read (0), int32 place in a cache line, the bytes
 *     operations 0 to 5: int64 count, `count` oz_tensor, one oz_options
 *     operations 6 to 8: three int64 for pointers, two int64 and four int32 for the other arguments
 * A pointer is the number of its region, counted from 1; 0 is NULL. The answer is the function's int32,
 * and the bytes of the regions that are written, in their order. */
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "optimzoo.h"

namespace {

constexpr size_t LINE = 64;

void read_all(void *to, size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, stdin) != bytes) {
    std::fputs("the call ends in its middle\n", stderr);
    std::exit(1);
  }
}

template <typename T>
T next() {
  T value;
  read_all(&value, sizeof value);
  return value;
}

/* Memory that begins where the caller's does in a cache line, so that rows lie as unevenly here as there. */
struct Region {
  std::vector<char> store;
  char *begin;
  size_t bytes;
  bool written;
};

std::vector<Region> regions;

/* Writes through to a field of a structure whatever its type of pointer. */
template <typename T>
void resolve(T *&pointer) {
  const auto number = reinterpret_cast<uintptr_t>(pointer);
  pointer = number ? reinterpret_cast<T *>(regions.at(number - 1).begin) : nullptr;
}

int run_on_tensors(int operation) {
  std::vector<oz_tensor> tensors(next<int64_t>());
  read_all(tensors.data(), tensors.size() * sizeof(oz_tensor));
  for (oz_tensor &t : tensors) {
    resolve(t.param);
    resolve(t.grad);
    resolve(t.exp_avg);
    resolve(t.exp_avg_sq);
    resolve(t.mask);
    resolve(t.step);
    resolve(t.extra);
    resolve(t.lr_tensor);
  }
  oz_options options = next<oz_options>();
  resolve(options.grad_scale);
  resolve(options.found_inf);
  constexpr decltype(&oz_cpu_scale) functions[] = {oz_cpu_scale, oz_cpu_adam, oz_cpu_reduce,
                                                   oz_cpu_apply, oz_cpu_center, oz_cpu_sinkhorn};
  return functions[operation](tensors.data(), static_cast<int64_t>(tensors.size()), &options,
                              nullptr);
}

int run_on_arrays(int operation) {
  char *pointers[3];
  read_all(pointers, sizeof pointers);
  for (char *&pointer : pointers) resolve(pointer);
  int64_t sizes[2];
  read_all(sizes, sizeof sizes);
  int32_t numbers[4];
  read_all(numbers, sizeof numbers);
  const auto floats_at = [&](int i) { return reinterpret_cast<float *>(pointers[i]); };
  if (operation == 6)
    return oz_cpu_history_dot(pointers[0], pointers[1], floats_at(2), sizes[0], sizes[1],
                              numbers[0], numbers[1]);
  if (operation == 7)
    return oz_cpu_history_combine(pointers[0], floats_at(1), floats_at(2), sizes[0], sizes[1],
                                  numbers[0], numbers[1]);
  return oz_cpu_nm_mask(pointers[0], reinterpret_cast<uint8_t *>(pointers[1]), sizes[0], sizes[1],
                        numbers[0], numbers[1], numbers[2], numbers[3]);
}

}  // namespace

int main() {
  static_assert(sizeof(void *) == 8, "a pointer's field holds its region's number");
  int32_t operation;
  while (std::fread(&operation, sizeof operation, 1, stdin) == 1) {
    regions.assign(next<int32_t>(), {});
    for (Region &region : regions) {
      region.bytes = static_cast<size_t>(next<int64_t>());
      region.written = next<int32_t>() != 0;
      const auto place = static_cast<size_t>(next<int32_t>());
      region.store.resize(region.bytes + 2 * LINE);
      const auto base = reinterpret_cast<uintptr_t>(region.store.data());
      region.begin = region.store.data() + (LINE - base % LINE) % LINE + place;
      read_all(region.begin, region.bytes);
    }
    const int32_t status = operation < 6 ? run_on_tensors(operation) : run_on_arrays(operation);
    std::fwrite(&status, sizeof status, 1, stdout);
    for (const Region &region : regions)
      if (region.written) std::fwrite(region.begin, 1, region.bytes, stdout);
    std::fflush(stdout);
  }
  return 0;
}
