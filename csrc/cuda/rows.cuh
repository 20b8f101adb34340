/* Rows shared among threads, and two ways of holding one between its sum and its update. */
#ifndef OZ_CUDA_ROWS_CUH
#define OZ_CUDA_ROWS_CUH

#include "table.cuh"

constexpr int BATCH = 4; /* 16-byte loads that a thread has in flight at a time */

/* Elements of one 16-byte vector of the gradient: threads take turns of that many, whatever the
 * other types and alignments are, so a row's sum depends on the gradient's type alone. */
OZ_BOTH int turn_of(int grad_type) { return grad_type == OZ_F32 ? 4 : 8; }

/* `size` threads that share a row: a power of two; of whole warps where something is summed. */
struct Team {
  int size, index, lane;
};

/* The fewest warps whose threads need no more than BATCH turns each, or a whole block. */
OZ_BOTH int team_size(int64_t cols, int turn) {
  int size = WARP;
  while (size < THREADS && int64_t{size} * BATCH * turn < cols) size *= 2;
  return size;
}

OZ_BOTH Team team_of(int size, int thread) {
  return {size, thread / size, thread & (size - 1)};
}

OZ_BOTH int64_t row_units(int64_t rows, int team) { return ceil_div(rows, THREADS / team); }

/* The row of a team in a unit; it may lie behind the last one. */
OZ_BOTH int64_t row_of(const Team &team, uint32_t unit) {
  return int64_t{unit} * (THREADS / team.size) + team.index;
}

/* ---- Rows in segments: where nothing is summed, a team takes one segment a unit. ---- */

constexpr int CHUNKS = 2; /* of eight columns, that a thread has in a segment */

OZ_BOTH int64_t segment_width(int team) { return int64_t{team} * CHUNKS * EIGHT; }

/* The fewest threads for a whole row, or a block. */
OZ_BOTH int segment_team(int64_t cols) {
  int size = 1;
  while (size < THREADS && segment_width(size) < cols) size *= 2;
  return size;
}

OZ_BOTH int64_t segment_units(int64_t rows, int64_t cols, int team) {
  return row_units(rows, team) * ceil_div(cols, segment_width(team));
}

struct Segment {
  int64_t row, col; /* its first column */
};

OZ_BOTH Segment segment_of(int64_t cols, const Team &team, uint32_t unit) {
  const uint32_t segments = static_cast<uint32_t>(ceil_div(cols, segment_width(team.size)));
  return {row_of(team, unit / segments), unit % segments * segment_width(team.size)};
}

/* ---- Rows that are summed. ---- */

/* A thread's first turn in its row; its turn i of batch b is `turn_at(b, i)` behind it. A warp's
 * turns follow each other, so that addresses differ by constants. */
OZ_BOTH int first_turn(const Team &team) {
  return team.lane / WARP * (WARP * BATCH) + team.lane % WARP;
}

OZ_BOTH int64_t turn_at(int64_t batch, int i) { return batch * (THREADS * BATCH) + i * WARP; }

/* Batches of a block's threads that a row of so many turns takes. */
OZ_BOTH int64_t batches_of(int64_t turns) { return ceil_div(turns, THREADS * BATCH); }

/* The team's sum, the same in all its threads. Every thread of the block calls it. */
OZ_DEVICE float team_sum(const Team &team, float x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (team.size == WARP) return x; /* the same in the whole block */
  __shared__ float parts[WARPS];
  const int warp = static_cast<int>(threadIdx.x) / WARP;
  __syncthreads(); /* the last sum has been read */
  if (threadIdx.x % WARP == 0) parts[warp] = x;
  __syncthreads();
  const int first = team.index * (team.size / WARP);
  float sum = 0.0f;
  for (int i = 0; i < team.size / WARP; ++i) sum += parts[first + i];
  return sum;
}

/* A thread's vectors of a row: in registers, one batch of them, or, for long rows, in the block's
 * shared memory, where each thread reads only what it has written itself. */
struct InRegisters {
  static constexpr bool REGISTERS = true;
  uint4 vectors[BATCH];
  OZ_DEVICE int batches() const { return 1; }
  OZ_DEVICE uint4 &at(int, int i) { return vectors[i]; }
};

struct InShared {
  static constexpr bool REGISTERS = false;
  uint4 *vectors; /* the thread's first */
  int count;
  OZ_DEVICE int batches() const { return count; }
  OZ_DEVICE uint4 &at(int batch, int i) { return vectors[(batch * BATCH + i) * THREADS]; }
};

#ifndef OZ_EMULATED /* which brings its own */
OZ_DEVICE uint4 *dynamic_shared() {
  extern __shared__ uint4 memory[];
  return memory;
}
#endif

/* A row of any length, with each of its vectors where a 16-byte access may be if the tensor begins
 * at one: `head` elements, then `vectors` of `each` elements, then `tail`. */
struct Cut {
  int64_t begin;
  int head, vectors, tail;
};

OZ_BOTH Cut cut_of(int64_t row, int64_t cols, int each) {
  Cut cut = {row * cols, 0, 0, 0};
  const int64_t head = -cut.begin & (each - 1);
  cut.head = static_cast<int>(head < cols ? head : cols);
  cut.vectors = static_cast<int>((cols - cut.head) / each);
  cut.tail = static_cast<int>((cols - cut.head) % each);
  return cut;
}

/* The element beside the vectors that a thread has, or -1: at most 14 a row, which a warp holds. */
OZ_DEVICE int64_t edge_of(const Slot &t, int64_t row, const Team &team, int each) {
  const Cut cut = cut_of(row, t.cols, each);
  if (row >= t.rows || team.lane >= cut.head + cut.tail) return -1;
  return cut.begin + team.lane + (team.lane < cut.head ? 0 : int64_t{cut.vectors} * each);
}

/* Where a thread's vectors of one row are in memory. */
struct Place {
  int64_t first; /* in vectors */
  int left;      /* vectors of the row from the first on; none of a row behind the last */

  /* One vector; zeros where the row has ended. */
  OZ_DEVICE uint4 load(const void *from, int batch, int i) const {
    if (turn_at(batch, i) >= left) return make_uint4(0, 0, 0, 0);
    return static_cast<const uint4 *>(from)[first + turn_at(batch, i)];
  }
  OZ_DEVICE void load(uint4 (&v)[BATCH], const void *from, int batch) const {
#pragma unroll
    for (int i = 0; i < BATCH; ++i) v[i] = load(from, batch, i);
  }
  OZ_DEVICE void store(void *to, int batch, int i, uint4 v) const {
    if (turn_at(batch, i) < left) static_cast<uint4 *>(to)[first + turn_at(batch, i)] = v;
  }
};

OZ_DEVICE Place place_of(const Slot &t, int64_t row, const Team &team, int each) {
  const Cut cut = cut_of(row, t.cols, each);
  const int first = first_turn(team);
  return {(cut.begin + cut.head) / each + first, row < t.rows ? cut.vectors - first : 0};
}

#endif
