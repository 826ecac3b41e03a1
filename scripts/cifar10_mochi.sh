#!/usr/bin/env bash
# ResNet-18 with MoCHi on CIFAR-10 in the settings of MoCo's own demo for one GPU, 200 epochs. The counts
# are a sixteenth of (1024, 1024, 128), as the queue is of ImageNet's.
# Usage: scripts/cifar10_mochi.sh DATA [SAVE_DIR] [extra flags ...]
# DATA is where torchvision keeps CIFAR-10; what is not there is downloaded. For a folder in ImageNet's layout give
# --dataset imagefolder --img-size 32 --stats cifar10. SAVE_DIR is runs/cifar10_mochi unless given; extra flags win
# over those below. The same command goes on after an interruption.
set -euo pipefail

if [[ ${1:--} == -* ]]; then
    echo "usage: $0 DATA [SAVE_DIR] [extra flags ...]" >&2
    exit 2
fi
data=$1 save_dir=runs/cifar10_mochi
shift
if [[ ${1:--} != -* ]]; then
    save_dir=$1
    shift
fi

dataset=(--dataset cifar10 --download)
case " $* " in
    *" --dataset "* | *" --dataset="*) dataset=() ;; # --download goes with a data set of its own alone
esac

exec python "$(dirname "$(realpath "$0")")/../main_synco.py" ${dataset[@]+"${dataset[@]}"} \
    -a resnet18 --stem cifar --epochs 200 --lr 0.06 --batch-size 512 --wd 5e-4 --momentum 0.9 --cos --bn-splits 8 \
    --moco-k 4096 --moco-m 0.99 --moco-t 0.1 --aug-plus --crop-scale 0.08,1 \
    --method mochi --warmup-epochs 10 \
    --knn-freq 10 --keep 2 --resume auto --save-dir "$save_dir" "$data" "$@"
