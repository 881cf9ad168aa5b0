#!/usr/bin/env bash
#PBS -N hvd_lars
#PBS -l select=2:ncpus=32:mpiprocs=4:ngpus=4
#PBS -l walltime=24:00:00
#PBS -j oe
#
#   qsub -v CONFIG=resnet50-lars-b8192,SETUP="module load openmpi" launch/pbs.sh
#
# OPTIONS="key=value …" replaces values of the config; RUN names the run folder, or else the config's
# run.dir.  After HOURS, or else the config's run.max_hours, or 23.8, the ranks keep a checkpoint and
# end with code 75: give a little less than the walltime.  The script then submits itself again, with QSUB="-q gpu -A project …" as options.
# SCRIPTS is the folder that it lies in, launch/ of where it is submitted if not given.
set -uo pipefail

cd "${PBS_O_WORKDIR:?qsub sets it}" || exit 2
export PATH="$PATH${PBS_O_PATH:+:$PBS_O_PATH}" # PBS hands on nothing else of where qsub ran
: "${CONFIG:?is not set: qsub -v CONFIG=my.yaml launch/pbs.sh}"
scripts=${SCRIPTS:-launch}
read -r -a setup <<<"${SETUP:-}"
read -r -a options <<<"${OPTIONS:-}"
read -r -a submit <<<"${QSUB:-}"
[ ${#setup[@]} -eq 0 ] || "${setup[@]}"
run=${RUN:-}
value() { hvd-lars check "$CONFIG" ${options[@]+"${options[@]}"} --get "$1"; }
[ -n "$run" ] || run=$(value run.dir) || exit 2
hours=${HOURS:-}
[ -n "$hours" ] || hours=$(value run.max_hours) || exit 2
hours=${hours:-23.8}
[ -n "$run" ] || run=runs/pbs-${PBS_JOBID%%.*}

NP=$(wc -l <"$PBS_NODEFILE") bash "$scripts/mpirun.sh" "$CONFIG" ${options[@]+"${options[@]}"} \
    "run.dir=$run" "run.max_hours=$hours" --resume &
job=$!
asked=
trap 'asked=1; kill -USR1 "$job" 2>/dev/null' USR1 TERM # mpirun hands SIGUSR1 on to every rank
while wait "$job"; code=$?; [ "$code" -gt 128 ] && kill -0 "$job" 2>/dev/null; do :; done

# Ranks that are still starting die of the request.
[ -z "$asked" ] || [ "$code" -le 128 ] || code=75
if [ "$code" = 75 ]; then # qrerun is for operators only
    export CONFIG SETUP="${SETUP:-}" OPTIONS="${OPTIONS:-}" HOURS="$hours" RUN="$run"
    export QSUB="${QSUB:-}" SCRIPTS="$scripts"
    qsub ${submit[@]+"${submit[@]}"} -v CONFIG,SETUP,OPTIONS,HOURS,RUN,QSUB,SCRIPTS \
        "$scripts/pbs.sh" && exit 0
fi
exit "$code"
