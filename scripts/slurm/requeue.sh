#!/usr/bin/env bash
# Run a batch job's command, and put the job back into the queue when the command was stopped before its end.
# Usage, from a batch script with "#SBATCH --signal=B:USR1@120": exec scripts/slurm/requeue.sh SAVE_DIR srun COMMAND ...
# Slurm sends USR1 to the batch shell alone, which exec makes this one, before the time limit (and before a preemption
# where the site has PreemptParameters=send_user_signal). srun passes the signal on to its tasks, the program writes a
# checkpoint and ends, and the job is requeued. Tasks that Slurm itself tells of a preemption, by SIGTERM, leave
# SAVE_DIR/preempted.json, which has the same effect. After scancel, which ends this shell, nothing is requeued; nor
# after a run that came to its end or failed by itself.
set -euo pipefail

save_dir=$1
shift
rm -f "$save_dir/preempted.json" # an older one would requeue a run that cannot start, over and over

warned="" signalled="" run=""
trap 'warned=1 signalled=1; [[ -z $run ]] || kill -USR1 "$run" || true' USR1

"$@" &
run=$!
status=0
wait "$run" || status=$?
while [[ $signalled ]]; do # the signal ended the wait, not the run
    signalled="" status=0
    wait "$run" || status=$?
done
if [[ $status -ne 0 && ($warned || -e $save_dir/preempted.json) ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
