#!/usr/bin/env bash
# Runs tests/fake_cuda: the real model on CUDA tensors that hold nothing, without a GPU.
# Usage: bash tools/test_fake_cuda.sh [--python python3.12] [--torch 2.11.0] [--measure [FILE.json]]
#        [arguments of pytest]
#   --torch    another version of torch, in an environment of its own
#   --measure  prints counts in the place of the tests, and writes them to FILE.json
# The environment takes 5.6 GB and is made the first time. Where it cannot be made, for want of disk,
# network or a C compiler, the script says so and ends with status 4.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh

NEEDED_GB=9 # packages and the files that pip unpacks on the way
INSTALL_TIMEOUT_S=${INSTALL_TIMEOUT_S:-3600}

cannot() {
    echo "NO FAKE CUDA: $1" >&2
    exit 4
}

name=python3
torch=
measure=
while [ $# -gt 0 ]; do
    case $1 in
    --python) name=${2:?--python needs a name such as python3.12} && shift 2 ;;
    --torch) torch=${2:?--torch needs a version such as 2.11.0} && shift 2 ;;
    --measure) measure=yes && shift && break ;;
    *) break ;;
    esac
done
base=$(find_python "$name")
folder=.venv-fake-cuda-$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
constraints=tools/constraints_fake_cuda.txt
if [ -n "$torch" ]; then
    folder=$folder-torch-$torch
    constraints=$(mktemp)
    sed "s/^torch==.*/torch==$torch/" tools/constraints_fake_cuda.txt >"$constraints"
fi
packages=("torch" "megatron-core>=0.16.1,<0.20" pytest pytest-timeout)
command -v cc >/dev/null || cannot "no C compiler cc here"
if [ ! -e "$folder/.installed" ]; then
    free_gb=$(($(df --output=avail -k . | tail -1) / 1000000))
    [ "$free_gb" -ge "$NEEDED_GB" ] || cannot "$free_gb GB of disk are free; it needs $NEEDED_GB"
fi
export -f make_environment fail
made=$(timeout "$INSTALL_TIMEOUT_S" bash -c 'set -euo pipefail
    make_environment "$@" >&2 && echo "$python"' make "$folder" "$base" "" "$constraints" \
    "${packages[@]}") || cannot "the environment could not be made in $INSTALL_TIMEOUT_S s"
python=$PWD/$made
[ -z "$torch" ] || rm -f "$constraints"
"$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
    cannot "torch here is built without CUDA"

libraries=$PWD/$folder/stand_ins
mkdir -p "$libraries"
# renamed into place: another run of this script may have the libraries loaded
cc -shared -fPIC -o "$libraries/made.$$" tests/fake_cuda/stand_ins.c
cp "$libraries/made.$$" "$libraries/copied.$$"
mv "$libraries/made.$$" "$libraries/libcuda.so.1"
mv "$libraries/copied.$$" "$libraries/first.so"
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export MEGASCALE_FAKE_CUDA=$libraries/first.so PYTHONPATH=$PWD OMP_NUM_THREADS=1
if [ -n "$measure" ]; then
    LD_PRELOAD=$libraries/first.so exec "$python" -W ignore tests/fake_cuda/measure.py "$@"
fi
LD_PRELOAD=$libraries/first.so exec "$python" -m pytest --timeout 200 -p no:cacheprovider \
    --confcutdir tests/fake_cuda tests/fake_cuda "$@"
