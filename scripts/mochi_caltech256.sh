#!/usr/bin/env bash
# MoCHi with timm's EfficientNet-B2 on Caltech-256 in the settings of a published run on one GPU: 25,000 steps, mixes of
# two negatives from step 5,000 on, mixes with the query from step 10,000 on.
# Usage: scripts/mochi_caltech256.sh DATA [SAVE_DIR] [extra flags ...]
# DATA is where torchvision keeps Caltech-256; what is not there is downloaded. timm is needed: pip install timm.
# SAVE_DIR is runs/mochi_caltech256 unless given; extra flags win over those below. The same command goes on after an
# interruption.
set -euo pipefail

if [[ ${1:--} == -* ]]; then
    echo "usage: $0 DATA [SAVE_DIR] [extra flags ...]" >&2
    exit 2
fi
data=$1 save_dir=runs/mochi_caltech256
shift
if [[ ${1:--} != -* ]]; then
    save_dir=$1
    shift
fi

dataset=(--dataset caltech256 --download)
case " $* " in
    *" --dataset "* | *" --dataset="*) dataset=() ;; # --download goes with a data set of its own alone
esac

exec python "$(dirname "$(realpath "$0")")/../main_synco.py" ${dataset[@]+"${dataset[@]}"} \
    -a timm:efficientnet_b2 --mlp --steps 25000 --batch-size 64 --optimizer adamw --wd 0.01 --clip-grad 5 \
    --lr 2e-4 --lr-min 2.5e-6 --lr-warmup 2.5e-7 --lr-warmup-epochs 2500s --cos --aug-heavy \
    --moco-dim 128 --moco-k 8192 --moco-m 0.999 --moco-t 0.07 --mask-same-image \
    --n-hard 32 --n1 16 --n2 0 --n3 16 --n4 0 --n5 0 --n6 0 --warmup-epochs 10000s,0,5000s,0,0,0 \
    --knn-freq 10 --keep 2 --resume auto --save-dir "$save_dir" "$data" "$@"
