#!/usr/bin/env bash
# From an empty machine to a passed test suite: the same set-up as quickstart.sh, then style,
# types and tests.  Options go to launch/setup.sh.
set -euo pipefail
unset CDPATH # with it, cd prints
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case " $* " in *" -h "* | *" --help "*) exec bash launch/setup.sh --help ;; esac
bin=$(bash launch/setup.sh --dev "$@")
export PATH="$bin:$PATH"
ruff check .
ruff format --check --quiet .
mypy
# Two tests at a time: a third of the suite waits for timeouts, launchers and schedulers.
python -m pytest -n 2 --dist worksteal
