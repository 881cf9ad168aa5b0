#!/usr/bin/env bash
# From an empty machine to a trained network: sets everything up, then trains configs/digits.yaml
# on two Horovod ranks.  Options go to launch/setup.sh: --torch, --apt, --no-nccl …
set -euo pipefail
unset CDPATH # with it, cd prints
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case " $* " in *" -h "* | *" --help "*) exec bash launch/setup.sh --help ;; esac
bin=$(bash launch/setup.sh "$@")
export PATH="$bin:$PATH"
horovodrun -np 2 hvd-lars train digits
echo "Next: source $bin/activate; hvd-lars doctor; horovodrun -np 2 hvd-lars train digits-sgd-b1024"
