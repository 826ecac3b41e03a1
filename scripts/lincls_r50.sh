#!/usr/bin/env bash
# Linear probe of a ResNet-50 on ImageNet in the published settings, and its result as a table.
# Usage: scripts/lincls_r50.sh CHECKPOINT IMAGENET [SAVE_DIR] [extra flags ...]
# CHECKPOINT may be 'random'. LRS="10 30 60" in the environment tries these learning rates in one pass, in a folder named
# after them below SAVE_DIR (CHECKPOINT-lincls unless given); the same command goes on after an interruption. NPROC:
# GPUs, 8.
set -euo pipefail

if [[ $# -lt 2 || $1 == -* || $2 == -* ]]; then
    echo "usage: $0 CHECKPOINT IMAGENET [SAVE_DIR] [extra flags ...]" >&2
    exit 2
fi
checkpoint=$1 data=$2 save_dir=${1%.pth.tar}-lincls root=$(dirname "$(realpath "$0")")/..
shift 2
if [[ ${1:--} != -* ]]; then
    save_dir=$1
    shift
fi

read -ra lrs <<<"${LRS:-30}"
torchrun --standalone --nproc-per-node "${NPROC:-8}" "$root/main_lincls.py" \
    -a resnet50 --epochs 100 --lr "${lrs[@]}" --schedule 60 80 --batch-size 256 --pretrained "$checkpoint" \
    --resume auto --save-dir "$save_dir/lr$(IFS=- && echo "${lrs[*]}")" "$data" "$@"
python "$root/scripts/best_of_grid.py" "$save_dir"
