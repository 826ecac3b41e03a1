#!/usr/bin/env bash
# COCO detection and masks with R50-C4 from converted weights, 90,000 iterations, in OUTPUT/trial1.
# Usage: scripts/detection_coco_1x.sh WEIGHTS DATA OUTPUT [TRIAL] [extra flags or KEY VALUE pairs ...]
# WEIGHTS is what convert-pretrain-to-detectron2.py wrote, DATA the folder of coco. Runs trial 1, or the one of the number
# TRIAL.
# An interrupted run goes on when the same command is called again. With fewer GPUs than 8 (NPROC=4 in the environment)
# detectron2 scales batch, learning rate and schedule; extra words win over those below.
set -euo pipefail

if [[ $# -lt 3 || $1 == -* || $2 == -* || $3 == -* ]]; then
    echo "usage: $0 WEIGHTS DATA OUTPUT [TRIAL] [extra flags or KEY VALUE pairs ...]" >&2
    exit 2
fi
weights=$1 data=$2 output=$3 trials=1
shift 3
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    trials=$1
    shift
fi

detection=$(dirname "$(realpath "$0")")/../detection
for trial in $trials; do
    python "$detection/train_net.py" --config-file "$detection/configs/coco_R_50_C4_1x_synco.yaml" \
        --data-dir "$data" --num-gpus "${NPROC:-8}" --resume \
        MODEL.WEIGHTS "$weights" OUTPUT_DIR "$output/trial$trial" SOLVER.REFERENCE_WORLD_SIZE 8 "$@"
done
python "$detection/summarize.py" "$output"
