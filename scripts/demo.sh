#!/usr/bin/env bash
# Pretrain on patches of real photographs with two gloo processes; then a linear probe, and fine-tuning on 10 % of the
# labels, beside the same from random weights; then a page of it all, in minutes on two CPU cores. `make demo` calls
# this. Both weights have the same learning rates, and each gets the best on training patches that are held out.
# Usage: scripts/demo.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."

export folder=${1:-runs/demo} CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
export patches="$folder/patches"
checkpoint="$folder/pretrain/checkpoint_0007.pth.tar"

python scripts/make_demo_patches.py "$patches"

echo "Pretraining without labels, 200 steps in two processes: about two minutes (all lines: $folder/pretrain.txt)"
torchrun --standalone --nproc-per-node 2 main_synco.py \
    -a resnet18 --img-size 32 --epochs 8 --warmup-epochs 2 -b 128 --lr 0.015 --lr-warmup-epochs 1 --wd 5e-4 --cos \
    --mlp --aug-plus --moco-k 1024 --moco-m 0.99 --moco-t 0.1 --bn-splits 2 \
    --n-hard 64 --n1 32 --n2 32 --n3 32 --n4 8 --n5 8 --n6 8 \
    --knn-freq 2 --knn-k 20 --keep 1 --seed 0 --overwrite --save-dir "$folder/pretrain" "$patches" |
    tee "$folder/pretrain.txt" | grep --line-buffered ^kNN

evaluate() { # NAME WEIGHTS
    local trials="$folder/trials/$1" lr best
    local common=(-a resnet18 --img-size 32 --seed 0 "$patches")
    local train=(--pretrained "$2" --hold-out 640 --val-freq 0)
    python main_lincls.py "${common[@]}" "${train[@]}" --epochs 8 -b 32 --cos --lr 0.003 0.01 0.03 0.1 0.3 1 \
        --save-dir "$trials/lincls"
    for lr in 0.002 0.01 0.05; do
        python main_semisup.py "${common[@]}" "${train[@]}" --epochs 16 -b 64 --train-percent 10 --weights finetune \
            --lr-backbone $lr --lr-classifier $lr --save-dir "$trials/semisup/lr$lr"
    done
    best=$(python scripts/best_of_grid.py "$trials/semisup" | awk 'NR == 2 { print $1 }')
    python main_semisup.py "${common[@]}" -e --resume "$trials/semisup/$best/checkpoint_semisup.pth.tar" \
        --save-dir "$trials/semisup"
    python -m synco.plot --embedding "$2" "$patches" -a resnet18 --img-size 32 -o "$folder/map-$1.png"
}
export -f evaluate

echo "Probes and fine-tuning of random and of pretrained weights: two to three minutes (all lines: $folder/trials/*.txt)"
rm -rf "$folder/trials" # those of an earlier call
mkdir "$folder/trials"
printf '%s\0' random random pretrained "$checkpoint" |
    xargs -0 -n 2 -P 2 bash -euo pipefail -c 'evaluate "$@" > "$folder/trials/$1.txt"' evaluate

python -m synco.plot "$folder/pretrain" -o "$folder/curves.png" > /dev/null
python -m synco.look "$checkpoint" "$patches" -n 6 -o "$folder/features.html" > /dev/null
python -m scripts.demo_page "$folder"
