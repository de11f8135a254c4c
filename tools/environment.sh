#!/usr/bin/env bash
# Makes or reuses a virtual environment with this package in it.
# Usage: . tools/environment.sh; make_environment FOLDER PYTHON [EXTRA]
# Leaves the path of its interpreter in $python.

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# find_python NAME: the path of a Python 3.11 or 3.12 of that name.
find_python() {
    local name=$1 found root version
    if "$name" -c '' 2>/dev/null; then
        found=$(command -v "$name")
    elif command -v pyenv >/dev/null; then
        # a pyenv shim fails while no version behind it is active; the version is there all the same
        root=$(pyenv root)
        for found in "$root"/versions/*/bin/"$name"; do :; done
    fi
    if [ -z "${found:-}" ] || ! "$found" -c '' 2>/dev/null; then
        fail "no working $name here; install Python 3.11 or 3.12, or name one with --python"
    fi
    version=$("$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    case $version in
        3.11 | 3.12) echo "$found" ;;
        *) fail "$name is Python $version; megascale needs 3.11 or 3.12 (--python NAME)" ;;
    esac
}

make_environment() {
    local folder=$1 base=$2 extra=${3:-} stamp wanted
    stamp=$folder/.installed
    wanted=$({ cat pyproject.toml tools/constraints.txt; echo "$extra"; "$base" --version; } | cksum)
    python=$folder/bin/python
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    echo "making the environment $folder (a few minutes the first time)"
    "$base" -m venv "$folder" || fail "$base cannot make a virtual environment; install its venv module"
    "$python" -m pip install --quiet --disable-pip-version-check \
        --constraint tools/constraints.txt --editable ".$extra" ||
        fail "pip could not install the package; its message is above"
    echo "$wanted" >"$stamp"
}
