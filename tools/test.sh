#!/usr/bin/env bash
# Runs the tests in an environment of their own.
# Usage: bash tools/test.sh [--python python3.12] [arguments of pytest, such as -n 0: one by one]
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh

name=python3
if [ "${1:-}" = --python ]; then
    name=${2:?--python needs a name such as python3.12}
    shift 2
fi
base=$(find_python "$name")
folder=.venv-test-$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
make_environment "$folder" "$base" "[test]"
# one thread per process: the tests start up to 4 ranks; many wait, so files are run two at a time
PATH=$PWD/$folder/bin:$PATH OMP_NUM_THREADS=1 exec "$python" -m pytest -n 2 --dist loadfile "$@"
