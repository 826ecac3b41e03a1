#!/usr/bin/env bash
# Pretrain on patches of real photographs with two gloo processes, then a linear probe and fine-tuning on 10 % of the
# labels, beside the same from random weights, in minutes on two CPU cores. `make demo` calls this.
# Usage: scripts/demo.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/.."

folder=${1:-runs/demo}
python scripts/make_demo_patches.py "$folder/patches"

CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 main_synco.py \
    -a resnet18 --img-size 32 --epochs 20 --warmup-epochs 2 -b 128 --lr 0.06 --wd 5e-4 --cos --mlp --aug-plus \
    --moco-k 1024 --moco-m 0.99 --moco-t 0.1 --bn-splits 2 --n-hard 64 --n1 32 --n2 32 --n3 32 --n4 8 --n5 8 --n6 8 \
    --knn-freq 5 --knn-k 20 --keep 1 --seed 0 --overwrite --save-dir "$folder/pretrain" "$folder/patches"

export CUDA_VISIBLE_DEVICES=""
for weights in "$folder/pretrain/checkpoint_0019.pth.tar" random; do
    trial=pretrained
    [ "$weights" = random ] && trial=random
    python main_lincls.py -a resnet18 --img-size 32 --epochs 20 --schedule 12 16 --lr 0.03 0.1 0.3 1 --seed 0 \
        --pretrained "$weights" --overwrite --save-dir "$folder/lincls-$trial" "$folder/patches"
    python main_semisup.py -a resnet18 --img-size 32 --epochs 30 -b 64 --train-percent 10 --weights finetune \
        --lr-backbone 0.02 --lr-classifier 0.2 --seed 0 \
        --pretrained "$weights" --overwrite --save-dir "$folder/semisup-$trial" "$folder/patches"
done

python - "$folder" <<'PY'
import json
import sys
from synco.metrics import read_log

folder = sys.argv[1]
found = {line["epoch"]: line["top1"] for line in read_log(f"{folder}/pretrain/log.jsonl") if line["kind"] == "knn"}


def top1(name):
    with open(f"{folder}/{name}/result.json") as file:
        return json.load(file)["last"]["top1"]


rows = [
    ("kNN, backbone", found[min(found)], found[max(found)]),
    ("linear probe", top1("lincls-random"), top1("lincls-pretrained")),
    ("fine-tuned on 10 % of the labels", top1("semisup-random"), top1("semisup-pretrained")),
]
print()
print(f"{'top-1 after the last epoch (16 classes)':40} {'random':>8} {'SynCo':>8}")
for name, random, pretrained in rows:
    print(f"{name:40} {random:6.1f} % {pretrained:6.1f} %")
PY
cat <<END

checkpoint   $folder/pretrain/checkpoint_0019.pth.tar
results      $folder/{lincls,semisup}-{pretrained,random}/result.json
curves       .venv/bin/tensorboard --logdir $folder/pretrain
your images  .venv/bin/python main_synco.py -a resnet50 --mlp --moco-t 0.2 --aug-plus --cos --save-dir runs/mine FOLDER
             FOLDER holds train/CLASS/IMAGE; --help lists every flag, README.md the published recipes
END
