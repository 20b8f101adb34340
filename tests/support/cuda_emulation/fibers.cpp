/* The threads of a block, in turns: see cuda_runtime.h. */
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, gridDim;

namespace {

constexpr int MOST = 1024, WARP = 32;
constexpr size_t STACK = 128 * 1024;

enum State { RUNNING, AT_BARRIER, AT_SHUFFLE, DONE };

struct Fiber {
  ucontext_t begin;
  jmp_buf place;
  bool begun = false;
  State state = DONE;
  uint32_t bits = 0; /* of a shuffle */
  int step = 0;
};

std::vector<Fiber> fibers;
alignas(16) unsigned char shared_memory[OZ_SHARED_BYTES];
const std::function<void()> *body;
ucontext_t first_of_all;
jmp_buf scheduler;
int current, threads;

[[noreturn]] void fail(const char *what) {
  std::fprintf(stderr, "emulated CUDA: %s (block %u, thread %d)\n", what, blockIdx.x, current);
  std::abort();
}

/* setcontext() begins a fiber; _setjmp() and _longjmp() change between them: no system calls. */
void yield(State state) {
  fibers[current].state = state;
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    (*body)();
    yield(DONE);
  }
}

void make_fibers() {
  fibers.resize(MOST);
  void *stacks = mmap(nullptr, MOST * STACK, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for stacks");
  for (int i = 0; i < MOST; ++i) {
    getcontext(&fibers[i].begin);
    fibers[i].begin.uc_stack.ss_sp = static_cast<char *>(stacks) + i * STACK;
    fibers[i].begin.uc_stack.ss_size = STACK;
    fibers[i].begin.uc_link = &first_of_all;
    makecontext(&fibers[i].begin, live, 0);
  }
}

void resume(int thread) {
  current = thread;
  threadIdx = dim3(static_cast<unsigned>(thread));
  Fiber &fiber = fibers[thread];
  fiber.state = RUNNING;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.begin);
}

bool all(State state, int from, int to) {
  for (int i = from; i < to; ++i)
    if (fibers[i].state != state) return false;
  return true;
}

void release(int from, int to) {
  for (int i = from; i < to; ++i) fibers[i].state = RUNNING;
}

/* A warp runs as far ahead of the others as it can: to the next barrier, or to its end. */
void run_warp(int warp, bool backwards) {
  for (;;) {
    for (int i = 0; i < WARP; ++i) resume(warp + (backwards ? WARP - 1 - i : i));
    if (all(AT_BARRIER, warp, warp + WARP) || all(DONE, warp, warp + WARP)) return;
    if (!all(AT_SHUFFLE, warp, warp + WARP)) fail("a warp's threads wait at different places");
    release(warp, warp + WARP);
  }
}

void run_block(bool backwards) {
  for (;;) {
    release(0, threads);
    for (int i = 0; i < threads; i += WARP) run_warp(backwards ? threads - WARP - i : i, backwards);
    if (all(DONE, 0, threads)) return;
    if (!all(AT_BARRIER, 0, threads)) fail("some threads wait for others that have ended");
  }
}

}  // namespace

uint4 *dynamic_shared() { return reinterpret_cast<uint4 *>(shared_memory); }

void __syncthreads() { yield(AT_BARRIER); }

uint32_t oz_exchange(uint32_t mask, uint32_t bits, int step) {
  if (mask != 0xffffffffu) fail("a shuffle of part of a warp");
  const int me = current, other = me ^ step;
  fibers[me].bits = bits;
  fibers[me].step = step;
  yield(AT_SHUFFLE);
  if (fibers[other].step != step) fail("a warp's threads are at different shuffles");
  const uint32_t result = fibers[other].bits;
  yield(AT_SHUFFLE);
  return result;
}

cudaError_t oz_emulate(const std::function<void()> &kernel, dim3 grid, dim3 block, size_t shared) {
  if (grid.x == 0 || block.x == 0 || block.x > MOST || block.x % WARP != 0 ||
      shared > OZ_SHARED_BYTES)
    return cudaErrorInvalidValue;
  if (fibers.empty()) make_fibers();
  const char *order = std::getenv("OZ_EMULATION_BACKWARDS");
  const bool backwards = order != nullptr && order[0] == '1';
  body = &kernel;
  gridDim = grid;
  threads = static_cast<int>(block.x);
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = dim3(b);
    std::memset(shared_memory, 0xff, shared); /* NaN */
    run_block(backwards);
  }
  return cudaSuccess;
}
