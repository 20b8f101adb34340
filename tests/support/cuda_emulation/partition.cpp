/* Parts of the kernels for tests, which ask about tensors too large to make. */
#include "columns.cuh"
#include "rows.cuh"

#define OZ_EXPORT extern "C" __attribute__((visibility("default")))

OZ_EXPORT int64_t oz_test_slots() { return SLOTS; }

OZ_EXPORT int64_t oz_test_column_units(int64_t rows, int64_t cols) {
  return column_units(rows, cols);
}
/* Its first column, its first row and the one behind its last, its chunk. */
OZ_EXPORT void oz_test_part(int64_t rows, int64_t cols, uint32_t unit, int64_t *out) {
  const Part part = part_of(rows, cols, unit);
  out[0] = part.col, out[1] = part.from, out[2] = part.to, out[3] = part.chunk;
}

OZ_EXPORT int64_t oz_test_segment_units(int64_t rows, int64_t cols) {
  return segment_units(rows, cols, segment_team(cols));
}
/* The row and the column of a thread's first element; the columns from there to its next chunk. */
OZ_EXPORT void oz_test_segment(int64_t cols, uint32_t unit, int thread, int64_t *out) {
  const Team team = team_of(segment_team(cols), thread);
  const Segment segment = segment_of(cols, team, unit);
  out[0] = segment.row, out[1] = segment.col + int64_t{team.lane} * EIGHT;
  out[2] = int64_t{team.size} * EIGHT;
}

OZ_EXPORT int64_t oz_test_row_units(int64_t rows, int64_t cols, int turn) {
  return row_units(rows, team_size(cols, turn));
}
/* The row of a thread and the column of its turn i in batch b. */
OZ_EXPORT void oz_test_turn(int64_t cols, int turn, uint32_t unit, int thread, int64_t b, int i,
                            int64_t *out) {
  const Team team = team_of(team_size(cols, turn), thread);
  out[0] = row_of(team, unit), out[1] = (first_turn(team) + turn_at(b, i)) * turn;
}

OZ_EXPORT int oz_test_slot_of(const uint32_t *start, int count, uint32_t unit, int guess) {
  static Table table;
  table.count = count;
  std::copy(start, start + count + 1, table.start);
  return slot_of(table, unit, guess);
}

/* Eight numbers rounded stochastically for elements from `at` on. */
OZ_EXPORT void oz_test_round(float *x, int type, uint32_t key, int64_t at) {
  Slot slot = {};
  Rule rule = {};
  slot.key = key;
  rule.stochastic = true;
  round_results(*reinterpret_cast<float(*)[EIGHT]>(x), type, slot, rule, at);
}
