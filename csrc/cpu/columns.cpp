#include "columns.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pieces.h"
#include "sets.h"

namespace {

// A tile's p and q, which are looked at three times, are to stay in the second cache.
constexpr int64_t kTileBytes = int64_t{1} << 20;
constexpr int64_t kPieceWork = 32768;
// Below this many elements waking a second thread costs more than it saves.
constexpr int64_t kParallelWork = 8192;

int64_t width_of(int64_t rows, int64_t classes) {
  const int64_t fits = kTileBytes / 16 / std::max<int64_t>(rows, 1) / 16 * 16;
  return std::clamp<int64_t>(fits, 16, std::min(kMaxWidth, (classes + 15) / 16 * 16));
}

template <KdColumnsStep step>
void visit_piece(const void* columns, int64_t begin, int64_t end, char* scratch) {
  kd_set().columns(*static_cast<const KdColumns*>(columns), step, begin, end, scratch);
}

}  // namespace

double kd_compare_columns(KdColumns& c, int threads) {
  c.count = std::count(c.active, c.active + c.rows, true);
  const size_t element = c.in_float64 ? 8 : 4;
  if (c.count == 0) {
    if (c.grad) std::memset(c.grad, 0, static_cast<size_t>(c.rows * c.classes) * element);
    return 0;
  }
  std::vector<double> memory(static_cast<size_t>(2 * c.rows + c.classes));
  c.student_log = memory.data(), c.teacher_log = memory.data() + c.rows;
  c.distance = memory.data() + 2 * c.rows;
  c.width = width_of(c.count, c.classes);
  if (c.rows * c.classes < kParallelWork) threads = 1;
  const int64_t bytes = kd_columns_scratch(c) * 8, rows = kPieceWork / c.classes;
  kd_in_pieces(c.rows, rows, threads, bytes, visit_piece<kNormalise>, &c);
  const int64_t tiles = (c.classes + c.width - 1) / c.width;
  kd_in_pieces(tiles, 1, threads, bytes, visit_piece<kCompare>, &c);
  if (c.grad) kd_in_pieces(c.rows, rows, threads, bytes, visit_piece<kFinish>, &c);
  double total = 0;
  for (int64_t k = 0; k < c.classes; ++k) total += c.distance[k];
  return total / static_cast<double>(c.classes);
}
