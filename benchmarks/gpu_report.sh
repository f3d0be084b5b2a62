#!/usr/bin/env bash
# Everything that needs a GPU, in one command, offline, in under 8 minutes: builds the kernels for
# the GPU that is there, checks every regime against float64, measures every provider beside the
# rate of a device copy, runs compute-sanitizer, and writes benchmarks/results/<device>.{json,md,png}.
#
#   bash benchmarks/gpu_report.sh                     all steps
#   bash benchmarks/gpu_report.sh --only build,info,correctness
#   bash benchmarks/gpu_report.sh --dry-run           the same flow on the CPU, tiny, without a build,
#                                                     into a temporary folder
#
# Ends with 0 if all checks passed, 1 if one failed or could not be made, 2 without a GPU. What it
# builds and caches stays in this tree: nothing is installed.
#
# Environment:
#   PYTHON                    the interpreter, with torch 2.11 or later (default: python3)
#   KDKERNELS_REPORT_SECONDS  for all steps together (default: 465)
#   KDKERNELS_COMMIT          what is measured, where git cannot say
#   KDKERNELS_WHEELS          a folder of wheels to compare with. Those of Liger-Kernel and
#                             orda-kernel are pure Python; where there is a network:
#                             pip download --no-deps -d FOLDER liger-kernel orda-kernel
#   OUT                       if set, the results are copied there too
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
work=$PWD/build/gpu_report

is_dry_run=false
for argument in "$@"; do
  if [[ $argument == --dry-run || $argument == --help || $argument == -h ]]; then is_dry_run=true; fi
done
if ! $is_dry_run && [[ $(nvidia-smi -L 2>/dev/null) != GPU* ]]; then
  echo "gpu_report: no GPU is visible (nvidia-smi -L lists none). Nothing was built or measured." >&2
  echo "gpu_report: --dry-run tries the report itself on the CPU." >&2
  exit 2
fi

# nvcc, compute-sanitizer and ncu, where an installation has left them off the PATH.
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [[ -n ${KDKERNELS_WHEELS:-} ]]; then
  for wheel in "$KDKERNELS_WHEELS"/*.whl; do
    "$python" -m zipfile -e "$wheel" "$work/wheels"
  done
  PYTHONPATH=$PYTHONPATH:$work/wheels
fi

# Compiled kernels are kept between runs, and out of the home directory.
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor PYTHONUNBUFFERED=1
exec "$python" -m benchmarks.gpu_report "$@"
