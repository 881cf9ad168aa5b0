#!/usr/bin/env bash
# Optional job for a container and a clone of its own: sets hvd_lars up with Debian's or Ubuntu's
# Open MPI 4 (installed here, as root) in place of the wheel's Open MPI 5, and runs what starts
# ranks.  Arguments go to pytest.
#
#   git clone . /tmp/om4
#   docker run --rm -v /tmp/om4:/src python:3.11-bookworm bash /src/tests/openmpi4.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    g++ libopenmpi-dev openmpi-bin openssh-client >&2
version=$(mpirun --version)
case $version in
*"Open MPI) 4."*) ;;
*)
    echo "openmpi4.sh: mpirun is ${version%%$'\n'*}, not Open MPI 4" >&2
    exit 2
    ;;
esac
bin=$(bash launch/setup.sh --dev)
export PATH="$bin:$PATH"
hvd-lars doctor
[ $# -gt 0 ] || set -- tests/launch tests/test_launcher.py
exec python -m pytest "$@"
