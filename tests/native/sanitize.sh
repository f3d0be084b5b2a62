#!/usr/bin/env bash
# Builds the native kernels with AddressSanitizer and UBSan and runs their native test cases, once
# per instruction set that this machine can execute. From anywhere: bash tests/native/sanitize.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cxx=${CXX:-c++}
# -O0: the sanitizers' checks make an optimiser take three times as long as all cases run.
flags="-std=c++17 -O0 -g1 -fno-omit-frame-pointer -Wno-psabi -Icsrc
       -fsanitize=address,undefined -fno-sanitize-recover=all"

jobs=()
compile() { # source, flags of its own
  $cxx $flags ${2:-} -c "$1" -o "$build/$(basename "$1" .cpp).o" &
  jobs+=($!)
}
wait_for_all() { # fails with the first that failed
  for job in "${jobs[@]}"; do wait "$job"; done
  jobs=()
}
sets=portable
if [ "$(uname -m)" = x86_64 ]; then
  flags="$flags -DKD_X86_SETS"
  compile csrc/cpu/rows_avx2.cpp "-mavx2 -mfma"
  compile csrc/cpu/rows_avx512.cpp "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma"
  for set in avx2 avx512f; do
    if grep -qw "$set" /proc/cpuinfo; then sets="$sets ${set%f}"; fi
  done
fi
for source in csrc/cpu/{run,columns,parallel,pieces,sets,rows_portable}.cpp \
              tests/native/test_rows.cpp; do compile "$source"; done
wait_for_all
# -lgomp: in a Python process torch brings the OpenMP runtime, here nobody else does.
$cxx -fsanitize=address,undefined "$build"/*.o -Wl,--no-as-needed -lgomp -ldl -lpthread \
  -o "$build/test_rows"
for set in $sets; do
  KDKERNELS_CPU=$set UBSAN_OPTIONS=print_stacktrace=1 "$build/test_rows" &
  jobs+=($!)
done
wait_for_all
