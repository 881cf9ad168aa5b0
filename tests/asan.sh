#!/usr/bin/env bash
# An optional job: the native kernel under AddressSanitizer and UBSan, over what may make it read or
# write where it must not.  Options go to pytest.  It needs g++ with its libasan.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$copy"
cd "$copy"
g++ -shared -fPIC -O1 -g -std=c++17 -fopenmp -ffp-contract=off -Wno-psabi -fno-omit-frame-pointer \
    -fsanitize=address,undefined hvd_lars/optim/kernels/native.cpp \
    -o "hvd_lars/optim/kernels/_native$(python -c \
        'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
python -c 'import hvd_lars; print("sanitized:", hvd_lars.__file__)'
python -m pytest -q -p no:cacheprovider \
    tests/peers tests/test_kernels.py tests/test_lars.py "$@"
HVD_LARS_TEST_BACKEND=local python -m pytest -q -p no:cacheprovider tests/peers/test_life_cycle.py
