#!/usr/bin/env bash
# torchrun as the task of a Slurm step: SIGUSR1, of which it would die, becomes the SIGTERM that it passes on to its
# workers, which then write a checkpoint.
# Usage: srun scripts/slurm/torchrun.sh FLAGS PROGRAM ...
set -euo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}" # seconds; old versions know only 30

signalled="" run=""
trap '' USR1 # inherited: where Slurm signals all processes of a step and not the task alone, torchrun ignores it
torchrun "$@" &
run=$!
trap 'signalled=1; kill -TERM "$run" || true' USR1 TERM

status=0
wait "$run" || status=$?
while [[ $signalled ]]; do # the signal ended the wait, not torchrun
    signalled="" status=0
    wait "$run" || status=$?
done
exit "$status"
