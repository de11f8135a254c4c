#!/usr/bin/env bash
# Makes the folder of wheels that `bash tools/gpu.sh` carries to a machine without a network. That
# machine has torch with CUDA and triton.
# Usage: bash tools/gpu_wheels.sh [--python NAME] [--for 3.12] [FOLDER]
#   --python  the Python whose pip downloads; python3 where it is left out
#   --for     the version of Python on the other machine
#   FOLDER    .gpu-wheels where it is left out
# The repository and the wheels together must stay below 60 MiB.
set -euo pipefail
cd "$(dirname "$0")/.."

MOST_MIB=60
# What megascale, megatron-core and tests/gpu import there, beside torch. The path needs none of
# datasets, pyarrow, numba, mpi4py and highspy.
PACKAGES=("megatron-core>=0.16.1,<0.20" numpy packaging psutil pyyaml xxhash rich markdown-it-py mdurl
    pygments pytest pluggy iniconfig hypothesis sortedcontainers)
python=python3
version=3.12
while [ $# -gt 1 ]; do
    case $1 in
    --python) python=$2 ;;
    --for) version=$2 ;;
    *) echo "gpu_wheels.sh: unknown option $1" >&2 && exit 2 ;;
    esac
    shift 2
done
folder=${1:-.gpu-wheels}
platforms=()
for glibc in 2_39 2_34 2_31 2_28 2_27 2_24 2_17 2_12 2_5; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
rm -rf "$folder"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version "$version" --implementation cp "${platforms[@]}" \
    --platform manylinux2014_x86_64 --constraint tools/constraints.txt --dest "$folder" \
    "${PACKAGES[@]}"
kib=$({ git ls-files -z | du -c --apparent-size -k --files0-from=- | tail -1
    du -s --apparent-size -k "$folder"; } | awk '{ sum += $1 } END { print sum }')
echo "$folder: $(find "$folder" -name '*.whl' | wc -l) wheels; with the repository $((kib / 1024)) MiB"
if [ $((kib / 1024)) -ge $MOST_MIB ]; then
    echo "gpu_wheels.sh: that is not below $MOST_MIB MiB" >&2
    exit 1
fi
