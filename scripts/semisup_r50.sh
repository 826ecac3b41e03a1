#!/usr/bin/env bash
# Fine-tune a ResNet-50 on 1, 10 or 100 percent of ImageNet's labels with the SynCo authors' grid of learning rates for
# the backbone, and print the best as a table.
# Usage: scripts/semisup_r50.sh PERCENT CHECKPOINT IMAGENET [SAVE_DIR] [extra flags ...]
# CHECKPOINT may be 'random'. Each rate has a folder of its own below SAVE_DIR (CHECKPOINT-semisup-PERCENTpercent unless
# given); the same command goes on after an interruption. In the environment: LRS, the grid; NPROC, the GPUs, 8.
set -euo pipefail

case ${1:-} in
    1) epochs=60 ;;
    10) epochs=30 ;;
    100) epochs=90 ;;
    *) epochs= ;;
esac
if [[ -z $epochs || $# -lt 3 || $2 == -* || $3 == -* ]]; then
    echo "usage: $0 1|10|100 CHECKPOINT IMAGENET [SAVE_DIR] [extra flags ...]" >&2
    exit 2
fi
percent=$1 checkpoint=$2 data=$3 save_dir=${2%.pth.tar}-semisup-$1percent root=$(dirname "$(realpath "$0")")/..
shift 3
if [[ ${1:--} != -* ]]; then
    save_dir=$1
    shift
fi

failed=0
for lr in ${LRS:-0.005 0.01 0.02 0.05 0.1}; do
    torchrun --standalone --nproc-per-node "${NPROC:-8}" "$root/main_semisup.py" \
        -a resnet50 --epochs "$epochs" --batch-size 1024 --lr-backbone "$lr" --lr-classifier 0.5 \
        --train-percent "$percent" --weights finetune --pretrained "$checkpoint" \
        --resume auto --save-dir "$save_dir/lr$lr" "$data" "$@" || failed=$?
    # after a rate that diverged the others still run; after Ctrl-C they do not
    if [[ $failed -gt 128 ]]; then
        exit "$failed"
    fi
done
python "$root/scripts/best_of_grid.py" "$save_dir"
exit "$failed"
