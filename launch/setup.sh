#!/usr/bin/env bash
# Finds a Python and sets hvd_lars up with it; prints the environment's folder of programs.
# Options: --torch cuda|cpu|keep, --torch-index URL, --apt, --no-nccl, --dev (see --help).
set -euo pipefail
unset CDPATH # with it, cd prints
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && exec "$PYTHON" "$here/install.py" "$@"
    echo "setup.sh: PYTHON=$PYTHON is not a Python 3.10 or newer" >&2
    exit 2
fi
for python in python3 python python3.13 python3.12 python3.11 python3.10 python3.14; do
    if command -v "$python" >/dev/null && usable "$python"; then
        exec "$python" "$here/install.py" "$@"
    fi
done
echo "setup.sh: no Python 3.10 or newer on PATH: Debian/Ubuntu \`apt-get install python3\`," \
    "RHEL/Rocky \`dnf install python3.11\`, conda \`conda create -n hvd python=3.11\`" >&2
exit 2
