#!/usr/bin/env bash
# Makes or reuses a virtual environment with this package in it.
# Usage: . tools/environment.sh; make_environment FOLDER PYTHON EXTRA [CONSTRAINTS [PACKAGE...]]
#   EXTRA        e.g. [train]
#   CONSTRAINTS  a file of versions; tools/constraints.txt where it is left out
# Leaves the path of its interpreter in $python.

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# is_ours PYTHON: whether it starts and is a version that this package runs on.
is_ours() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

# find_python NAME: the path of a Python 3.11 or 3.12 of that name.
find_python() {
    local name=$1 found
    if is_ours "$name"; then
        command -v "$name"
        return
    fi
    if command -v pyenv >/dev/null; then
        # a shim fails while no version behind it is active; the version is there all the same
        for found in "$(pyenv root)"/versions/3.1[12]*/bin/"$name"; do
            if is_ours "$found"; then
                echo "$found"
                return
            fi
        done
    fi
    if "$name" -c '' 2>/dev/null; then
        fail "$name is $("$name" --version 2>&1); megascale needs 3.11 or 3.12 (--python NAME)"
    fi
    fail "no working $name here; install Python 3.11 or 3.12, or name one with --python"
}

make_environment() {
    local folder=$1 base=$2 extra=$3 constraints=${4:-tools/constraints.txt} stamp wanted
    shift $(($# < 4 ? $# : 4))
    stamp=$folder/.installed
    wanted=$({ cat pyproject.toml "$constraints"; echo "$extra" "$@"; "$base" --version; } | cksum)
    python=$folder/bin/python
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    echo "making the environment $folder (a few minutes the first time)"
    if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
        fail "$base cannot make a virtual environment; install its venv module (python3-venv)"
    fi
    if [ "$("$python" --version 2>/dev/null)" != "$("$base" --version)" ]; then
        rm -rf "$folder" # of another Python, or half made
    fi
    "$base" -m venv "$folder" || fail "$base could not make a virtual environment in $folder"
    "$python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$constraints" --editable ".$extra" "$@" ||
        fail "pip could not install the package; its message is above"
    echo "$wanted" >"$stamp"
}
