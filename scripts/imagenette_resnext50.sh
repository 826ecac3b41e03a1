#!/usr/bin/env bash
# MoCo v2 with a ResNeXt-50 32x4d on Imagenette in the settings of a published run on one GPU: 600 epochs, and then 200
# epochs of linear probe on the last checkpoint.
# Usage: scripts/imagenette_resnext50.sh DATA [SAVE_DIR] [extra flags ...] [-- extra flags of the probe ...]
# DATA is where torchvision keeps Imagenette; what is not there is downloaded. SAVE_DIR is runs/imagenette_resnext50
# unless given; the probe's is SAVE_DIR/lincls. Extra flags win over those below; those that say which images and which
# network are the probe's, too. The same command goes on after an interruption.
set -euo pipefail

if [[ ${1:--} == -* ]]; then
    echo "usage: $0 DATA [SAVE_DIR] [extra flags ...] [-- extra flags of the probe ...]" >&2
    exit 2
fi
data=$1 save_dir=runs/imagenette_resnext50 root=$(dirname "$(realpath "$0")")/.. flags=()
shift
if [[ ${1:--} != -* ]]; then
    save_dir=$1
    shift
fi
while [[ $# -gt 0 && $1 != -- ]]; do
    flags+=("$1")
    shift
done
shift $(($# > 0)) # the --

dataset=(--dataset imagenette --download)
case " ${flags[*]-} " in
    *" --dataset "* | *" --dataset="*) dataset=() ;; # --download goes with a data set of its own alone
esac

python "$root/main_synco.py" ${dataset[@]+"${dataset[@]}"} -a resnext50_32x4d \
    --epochs 600 --lr 0.03 --batch-size 32 --wd 1e-4 --cos --mlp --moco-k 16384 --moco-t 0.2 --aug-plus \
    --n1 0 --n2 0 --n3 0 --n4 0 --n5 0 --n6 0 \
    --knn-freq 1 --knn-train --save-best --keep 1 --resume auto --save-dir "$save_dir" "$data" ${flags[@]+"${flags[@]}"}

shared=(--dataset imagenette -a resnext50_32x4d)
for ((i = 0; i < ${#flags[@]}; i++)); do
    case ${flags[i]} in
        --dataset | -a | --arch | --limit-images | --hold-out | --split-seed) shared+=("${flags[i]}" "${flags[i + 1]-}") ;;
        --dataset=* | -a* | --arch=* | --limit-images=* | --hold-out=* | --split-seed=*) shared+=("${flags[i]}") ;;
    esac
done
checkpoints=("$save_dir"/checkpoint_[0-9]*.pth.tar) # oldest first
python "$root/main_lincls.py" "${shared[@]}" \
    --epochs 200 --lr 0.03 --batch-size 32 --cos --lr-min 5e-7 --pretrained "${checkpoints[${#checkpoints[@]} - 1]}" \
    --resume auto --save-dir "$save_dir/lincls" "$data" "$@"
