#include "sets.h"

#include <cstdlib>
#include <cstring>

namespace {

KdSet choose() {
#if defined(KD_X86_SETS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  const char* asked = std::getenv("KDKERNELS_CPU");
  const auto wanted = [&](const char* name) { return !asked || !std::strcmp(asked, name); };
  if (avx512 && wanted("avx512")) return {"avx512", kd_rows_avx512, kd_columns_avx512};
  if (avx2 && wanted("avx2")) return {"avx2", kd_rows_avx2, kd_columns_avx2};
#endif
  return {"portable", kd_rows_portable, kd_columns_portable};
}

}  // namespace

const KdSet& kd_set() {
  static const KdSet chosen = choose();
  return chosen;
}
