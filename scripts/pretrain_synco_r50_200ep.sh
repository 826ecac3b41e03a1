#!/usr/bin/env bash
# ResNet-50 with SynCo, 200 epochs on ImageNet. The same command goes on after an interruption.
# Usage: scripts/pretrain_synco_r50_200ep.sh IMAGENET [SAVE_DIR] [extra flags ...]
# SAVE_DIR is runs/synco_r50_200ep unless given; extra flags win over those below. The recipe is for 8 GPUs: on 2, say,
# NPROC=2 in the environment and --bn-splits 4 keep its batch and its BatchNorm over 32 images.
set -euo pipefail

if [[ ${1:--} == -* ]]; then
    echo "usage: $0 IMAGENET [SAVE_DIR] [extra flags ...]" >&2
    exit 2
fi
data=$1 save_dir=runs/synco_r50_200ep
shift
if [[ ${1:--} != -* ]]; then
    save_dir=$1
    shift
fi

exec torchrun --standalone --nproc-per-node "${NPROC:-8}" "$(dirname "$(realpath "$0")")/../main_synco.py" \
    -a resnet50 --epochs 200 --lr 0.03 --batch-size 256 --mlp --moco-t 0.2 --aug-plus --cos \
    --method synco \
    --resume auto --save-dir "$save_dir" "$data" "$@"
