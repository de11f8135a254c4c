#!/usr/bin/env bash
# The acceptance on one GPU, in parts of at most 4 minutes each, without a network.
# Usage: bash tools/gpu.sh [--python NAME] [--wheels FOLDER] [--json FILE] [--small] [--part NAME]...
#   --python  the Python that has torch; python3 where it is left out
#   --wheels  what `bash tools/gpu_wheels.sh` made; .gpu-wheels where it is left out
#   --json    where the rows go; rows of parts that are not run again stay there
#   --small   tiny sizes, also on CPU, to test the acceptance itself
#   --part    this part alone; may be given several times
# Packages that Python lacks are installed from the wheels into .gpu-site. The time for that counts
# for the first part. The status is 1 where a row failed or a part did not end.
set -euo pipefail
cd "$(dirname "$0")/.."

PART_S=${PART_S:-240}
python=python3
wheels=.gpu-wheels
json=gpu.json
small=()
parts=()
while [ $# -gt 0 ]; do
    case $1 in
    --python | --wheels | --json | --part)
        [ -n "${2:-}" ] || { echo "gpu.sh: $1 needs a value; --help lists the options" >&2 && exit 2; } ;;&
    -h | --help) sed -n '2,/^set /{/^# /s/^# //p}' "$0" && exit 0 ;;
    --small) small=(--small) && shift && continue ;;
    --python) python=$2 ;;
    --wheels) wheels=$2 ;;
    --json) json=$2 ;;
    --part) parts+=("$2") ;;
    *) echo "gpu.sh: unknown option $1; --help lists the options" >&2 && exit 2 ;;
    esac
    shift 2
done
began=$SECONDS
"$python" -c 'import importlib.util as u; exit(u.find_spec("torch") is None)' || { echo "gpu.sh: $python has no torch (--python NAME)" >&2 && exit 2; }
missing=()
[ ! -d "$wheels" ] || mapfile -t missing < <("$python" tools/gpu_missing.py "$wheels")
if [ ${#missing[@]} -gt 0 ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --disable-pip-version-check --target .gpu-site "${missing[@]}"
fi
export PYTHONPATH=$PWD:$PWD/.gpu-site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
[ ${#parts[@]} -gt 0 ] || read -ra parts < <("$python" tools/gpu.py --list)
for part in "${parts[@]}"; do
    left=$((PART_S - SECONDS + began))
    [ "$left" -ge 1 ] || left=1
    began=$SECONDS
    echo "== $part"
    status=0
    timeout --kill-after 5 "$left" "$python" tools/gpu.py --part "$part" --json "$json" \
        "${small[@]}" || status=$?
    [ $status -ne 2 ] || exit 2 # no device, or no part of that name
    [ $status -eq 0 ] || "$python" tools/gpu.py --part "$part" --json "$json" --ended "$status"
done
exec "$python" tools/gpu_rows.py "$json"
