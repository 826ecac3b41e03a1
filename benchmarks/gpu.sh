#!/usr/bin/env bash
# The measurements that want a GPU, in under 10 minutes on one: the loss head, the whole step, the input pipeline.
#
#   benchmarks/gpu.sh [FOLDER]     # FOLDER/CLASS/IMAGE, for the input pipeline; without it that one is left out
#
# With 20,000 images or more in FOLDER the program itself runs 70 steps on them, and prints images/s and the share of
# the time that it waits for images.
#
# Further flags of step.py in STEP, of that pretraining in PRETRAIN: STEP="--compile" benchmarks/gpu.sh
#
# A part that fails or takes too long does not end the others; a list of those closes the output, with status 1.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."
python=${PYTHON:-python}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu.sh: error: torch finds no GPU on this machine" >&2
  exit 2
}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true

failed=()
part() { # SECONDS PROGRAM [flags ...]
  timeout -k 10 "$1" "$python" "${@:2}" || failed+=("status $?: ${*:2}")
}
part 60 benchmarks/head.py -n 32
part 60 benchmarks/head.py -n 256
# shellcheck disable=SC2086
part 180 benchmarks/step.py ${STEP:-}
# shellcheck disable=SC2086
part 120 benchmarks/step.py --amp off --no-channels-last --tf32 ${STEP:-}
if [ $# -gt 0 ]; then
  part 120 benchmarks/input.py "$1"
  if [ "$(find -L "$1" -type f | head -n 20000 | wc -l)" = 20000 ]; then
    run=$(mktemp -d)
    trap 'rm -rf "$run"' EXIT
    ln -s "$(realpath "$1")" "$run/train"
    # shellcheck disable=SC2086
    part 180 main_synco.py -a resnet50 -b 256 --mlp --moco-t 0.2 --aug-plus --cos --amp bf16 \
      --channels-last --augment-on device --steps 70 --warmup-epochs 0 --save-dir "$run/run" ${PRETRAIN:-} "$run"
  fi
fi
for one in ${failed[@]+"${failed[@]}"}; do
  echo "gpu.sh: failed with $one" >&2
done
exit $((${#failed[@]} > 0))
