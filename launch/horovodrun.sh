#!/usr/bin/env bash
# Training under horovodrun, started again from its last checkpoint when something fails:
#
#   HOSTS=node1:4,node2:4 launch/horovodrun.sh CONFIG run.dir=runs/a [key=value …]
#
# Without HOSTS: one rank a GPU of this machine, or two where it has none.  NIC=eth0 keeps all
# traffic on that interface.  PRINT=1 prints the command.  launch/supervise chooses the hosts that
# answer, and turns SIGTERM, SIGUSR1 and Ctrl-C into a checkpoint and code 75: horovodrun itself
# dies of SIGUSR1 and leaves its workers behind.
set -euo pipefail

[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true)
hosts=${HOSTS:-localhost:$((gpus > 0 ? gpus : 2))}
command=("$here/supervise" --hosts "$hosts" -- horovodrun -np '{np}' -H '{hosts}')
[ -z "${NIC:-}" ] || command+=(--network-interfaces "$NIC")
command+=(hvd-lars train "$@" --resume)
if [ -n "${PRINT:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
