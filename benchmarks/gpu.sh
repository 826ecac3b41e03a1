#!/usr/bin/env bash
# The measurements that want a GPU, in under 10 minutes on one: the loss head, the whole step, the input pipeline.
#
#   benchmarks/gpu.sh [FOLDER]     # FOLDER/CLASS/IMAGE, for the input pipeline; without it that one is left out
#
# With 20,000 images or more in FOLDER the program itself runs 70 steps on them, and prints images/s and the share of
# the time that it waits for images.
#
# Further flags of step.py in STEP: STEP="--compile" benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
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
  if [ "$(find -L "$1" -type f | head -n 20000 | wc -l)" = 20000 ]; then
    run=$(mktemp -d)
    trap 'rm -rf "$run"' EXIT
    ln -s "$(realpath "$1")" "$run/train"
    # shellcheck disable=SC2086
    timeout 180 "$python" main_synco.py -a resnet50 -b 256 --mlp --moco-t 0.2 --aug-plus --cos --amp bf16 \
      --channels-last --augment-on device --steps 70 --warmup-epochs 0 --save-dir "$run/run" ${STEP:-} "$run"
  fi
fi
