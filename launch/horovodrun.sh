#!/usr/bin/env bash
# Training under horovodrun, started again from its last checkpoint when something fails:
#
#   HOSTS=node1:4,node2:4 launch/horovodrun.sh CONFIG run.dir=runs/a [key=value …]
#
# Without HOSTS: those of the allocation that it runs in (SLURM, PBS), else one rank a GPU of this
# machine, or two where it has none.  NIC=eth0 keeps all traffic on that interface.  PRINT=1 prints
# the command.  launch/supervise chooses the hosts that
# answer, and turns SIGTERM, SIGUSR1 and Ctrl-C into a checkpoint and code 75: horovodrun itself
# dies of SIGUSR1 and leaves its workers behind.
set -euo pipefail

[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
unset CDPATH # with it, cd prints
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true)
hosts=localhost:$((gpus > 0 ? gpus : 2))
if [ -n "${HOSTS:-}" ]; then
    hosts=$HOSTS
elif [ -n "${PBS_NODEFILE:-}" ]; then
    hosts=$(sort "$PBS_NODEFILE" | uniq -c | awk '{print $2 ":" $1}' | paste -sd,)
elif [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    slots=${SLURM_NTASKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/:$slots/" | paste -sd,)
fi
command=("$here/supervise" --hosts "$hosts" -- horovodrun -np '{np}' -H '{hosts}')
[ -z "${NIC:-}" ] || command+=(--network-interfaces "$NIC")
command+=(hvd-lars train "$@" --resume)
if [ -n "${PRINT:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
