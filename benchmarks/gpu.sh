#!/usr/bin/env bash
# The measurements that want a GPU, in under 10 minutes on one: the loss head, the whole step, the input pipeline.
#
#   benchmarks/gpu.sh [FOLDER]     # FOLDER/CLASS/IMAGE, for the input pipeline; without it that one is left out
#
# Further flags of step.py in STEP: STEP="--compile" benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu.sh: error: torch finds no GPU on this machine" >&2
  exit 2
}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
timeout 60 "$python" benchmarks/head.py -n 32
timeout 60 "$python" benchmarks/head.py -n 256
# shellcheck disable=SC2086
timeout 180 "$python" benchmarks/step.py ${STEP:-}
# shellcheck disable=SC2086
timeout 120 "$python" benchmarks/step.py --amp off --no-channels-last --tf32 ${STEP:-}
if [ $# -gt 0 ]; then
  timeout 120 "$python" benchmarks/input.py "$1"
fi
