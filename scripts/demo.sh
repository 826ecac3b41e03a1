#!/usr/bin/env bash
# Pretrain on patches of real photographs with two gloo processes, in minutes on two CPU cores. `make demo` calls this.
# Usage: scripts/demo.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-runs/demo}
python scripts/make_demo_patches.py "$folder/patches"

CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 main_synco.py \
    -a resnet18 --img-size 32 --epochs 20 --warmup-epochs 2 -b 128 --lr 0.06 --wd 5e-4 --cos --mlp --aug-plus \
    --moco-k 1024 --moco-m 0.99 --moco-t 0.1 --bn-splits 2 --n-hard 64 --n1 32 --n2 32 --n3 32 --n4 8 --n5 8 --n6 8 \
    --knn-freq 5 --knn-k 20 --keep 1 --seed 0 --overwrite --save-dir "$folder/pretrain" "$folder/patches"

python - "$folder/pretrain/log.jsonl" <<'PY'
import sys
from synco.metrics import read_log

found = {line["epoch"]: line["top1"] for line in read_log(sys.argv[1]) if line["kind"] == "knn"}
print()
print(f"kNN accuracy at random initialisation: {found[min(found)]:.1f} % (16 classes: chance is 6.2 %)")
print(f"kNN accuracy after {max(found)} epochs: {found[max(found)]:.1f} %")
PY
cat <<END

checkpoint   $folder/pretrain/checkpoint_0019.pth.tar
curves       .venv/bin/tensorboard --logdir $folder/pretrain
your images  .venv/bin/python main_synco.py -a resnet50 --mlp --moco-t 0.2 --aug-plus --cos --save-dir runs/mine FOLDER
             FOLDER holds train/CLASS/IMAGE; --help lists every flag, README.md the published recipes
END
