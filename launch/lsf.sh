#!/usr/bin/env bash
#BSUB -J hvd_lars
#BSUB -nnodes 2
#BSUB -W 24:00
#BSUB -wa USR1
#BSUB -wt 5
#BSUB -r
#BSUB -Q "75"
#BSUB -o hvd_lars.%J.log
#
#   CONFIG=resnet50-lars-b8192 bsub < launch/lsf.sh
#
# On LSF with jsrun (Summit's kind).  OPTIONS="key=value …" replaces values of the config; RUN names
# the run folder, or else the config's run.dir.  One rank a GPU: GPUS_PER_NODE (6) and CORES_PER_GPU
# (7) say how many there are.  Five minutes before the time is up the ranks keep a checkpoint and end
# with code 75, with which LSF queues the job again (-Q); it goes on in its run folder.
set -uo pipefail

: "${CONFIG:?is not set: CONFIG=my.yaml bsub < launch/lsf.sh}"
read -r -a options <<<"${OPTIONS:-}"
run=${RUN:-}
[ -n "$run" ] || run=$(hvd-lars check "$CONFIG" ${options[@]+"${options[@]}"} --get run.dir) || exit 2
[ -n "$run" ] || run=runs/lsf-${LSB_JOBID:?not inside LSF}
# "batch 1 node1 42 node2 42": all hosts but the one that launches.
nodes=$(tr ' ' '\n' <<<"${LSB_MCPU_HOSTS:-}" | grep -vEc '^[0-9]*$|batch|login')

jsrun -n $((nodes * ${GPUS_PER_NODE:-6})) -a 1 -g 1 -c "${CORES_PER_GPU:-7}" -b none \
    hvd-lars train "$CONFIG" ${options[@]+"${options[@]}"} "run.dir=$run" --resume &
step=$!
asked=
trap 'asked=1; kill -USR1 "$step" 2>/dev/null' USR1 TERM # jsrun hands it on to every rank
while wait "$step"; code=$?; [ "$code" -gt 128 ] && kill -0 "$step" 2>/dev/null; do :; done
# Ranks that are still starting die of the request.
[ -z "$asked" ] || [ "$code" -le 128 ] || code=75
exit "$code"
