#!/usr/bin/env bash
# One training job under the mpirun on PATH: Open MPI 4 or 5, MPICH or Intel MPI.
#
#   NP=4 launch/mpirun.sh CONFIG [key=value …]                  # here
#   HOSTS=node1:4,node2:4 launch/mpirun.sh CONFIG [key=value …] # there; neither: the allocation's
#
# NIC=eth0 keeps all traffic on that interface.  PRINT=1 prints the command.  It becomes mpirun:
# SIGUSR1 to it makes the ranks keep a checkpoint and end with code 75.
set -euo pipefail

[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
command -v mpirun >/dev/null || { echo "mpirun.sh: no mpirun on PATH: load the MPI module or activate the environment" >&2; exit 2; }
version=$(mpirun --version 2>&1 | head -n 3)
hosts=() names=() sizes=() nic=${NIC:-} np=${NP:-}
[ -z "${HOSTS:-}" ] || IFS=, read -r -a hosts <<<"$HOSTS"
for host in ${hosts[@]+"${hosts[@]}"}; do
    slots=${host#*:}
    [ "$slots" != "$host" ] || slots=1
    [[ ${host%%:*} && $slots =~ ^[1-9][0-9]*$ ]] || { echo "mpirun.sh: HOSTS: found '$HOSTS'; write" \
        "a:4,b:4: hosts with their ranks" >&2; exit 2; }
    names+=("${host%%:*}") sizes+=("$slots")
    [ -n "${NP:-}" ] || np=$((${np:-0} + slots))
done
command=(mpirun)
[ -z "$np" ] || command+=(-np "$np")

case $version in
*"Open MPI"* | *OpenRTE*)
    if [ -n "${HOSTS:-}" ]; then
        command+=(-H "$HOSTS")
    elif [ -n "${OMPI_MCA_orte_default_hostfile:-}" ]; then # of the MPI operator; Open MPI 5 has
        command+=(--hostfile "$OMPI_MCA_orte_default_hostfile") # another name for it
    fi
    command+=(--bind-to none --map-by slot)
    case $version in *") 4."*) command+=(-mca pml ob1 -mca btl ^openib) ;; esac
    [ -z "$nic" ] || command+=(-mca btl_tcp_if_include "$nic" -x "NCCL_SOCKET_IFNAME=$nic")
    [ "$(id -u)" != 0 ] || command+=(--allow-run-as-root)
    # Open MPI hands on nothing but its own variables.
    while read -r name; do
        case $name in
        PATH | LD_LIBRARY_PATH | PYTHONPATH | VIRTUAL_ENV | CONDA_PREFIX | OMP_* | HOROVOD_* | \
            NCCL_* | HVD_LARS_* | CUDA_VISIBLE_DEVICES) command+=(-x "$name") ;;
        esac
    done < <(compgen -e)
    ;;
*) # MPICH and Intel MPI hand the environment on.
    if [ -n "${HOSTS:-}" ]; then
        for slots in "${sizes[@]}"; do
            [ "$slots" = "${sizes[0]}" ] || { echo "mpirun.sh: $HOSTS: MPICH and Intel MPI" \
                "take the same number of ranks on every host" >&2; exit 2; }
        done
        command+=(-ppn "${sizes[0]}" -hosts "$(IFS=,; echo "${names[*]}")")
    fi
    [ -z "$nic" ] || command+=(-iface "$nic" -genv NCCL_SOCKET_IFNAME "$nic")
    case $version in *Intel*) command+=(-genv I_MPI_PIN off) ;; *) command+=(-bind-to none) ;; esac
    ;;
esac
command+=(hvd-lars train "$@")
if [ -n "${PRINT:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
