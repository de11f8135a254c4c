#!/usr/bin/env bash
# Runs the tests in an environment of their own.
# Usage: bash tools/test.sh [--python python3.12] [--quick] [arguments of pytest]
#   --quick  the part of the tests that tests/quick.py lists, under 4 minutes on 2 idle cores
#   -n 0     an argument of pytest: one test after another
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh

name=python3
quick=
while [ "${1:-}" = --python ] || [ "${1:-}" = --quick ]; do
    if [ "$1" = --quick ]; then
        quick=yes
        shift
    else
        name=${2:?--python needs a name such as python3.12}
        shift 2
    fi
done
base=$(find_python "$name")
folder=.venv-test-$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
make_environment "$folder" "$base" "[test]"
chosen=()
[ -z "$quick" ] || mapfile -t chosen < <("$python" tests/quick.py)
# one thread per process: the tests start up to 4 ranks; many wait, so files are run two at a time
PATH=$PWD/$folder/bin:$PATH OMP_NUM_THREADS=1 exec "$python" -m pytest -n 2 --dist loadfile \
    "${chosen[@]}" "$@"
