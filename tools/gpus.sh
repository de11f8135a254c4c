#!/usr/bin/env bash
# The acceptance on the GPUs of one machine, by torchrun; see tools/gpus.py.
# Usage: bash tools/gpus.sh [--python NAME] [--ranks N] [--json FILE] [--part NAME]... [--plans N]
#   --python  the Python that has torch and megascale's packages; python3 where it is left out
#   --ranks   processes, a GPU each; as many as there are GPUs where it is left out
#   --json    where the rows go; gpus.json where it is left out
#   --part    this part alone; may be given several times
#   --plans   random plans; 1000 where it is left out
# Each part runs in processes of its own. The status is 1 where a row failed or a part did not end.
# A rank that hangs prints where each thread is and ends, and NCCL's flight recorder writes what each
# rank was waiting for beside the rows.
set -euo pipefail
cd "$(dirname "$0")/.."

python=python3
json=gpus.json
ranks=
parts=()
plans=()
while [ $# -gt 0 ]; do
    case $1 in
    --python | --ranks | --json | --part | --plans)
        [ -n "${2:-}" ] || { echo "gpus.sh: $1 needs a value; --help lists the options" >&2 && exit 2; } ;;&
    -h | --help) sed -n '2,/^set /{/^# /s/^# //p}' "$0" && exit 0 ;;
    --python) python=$2 ;;
    --ranks) ranks=$2 ;;
    --json) json=$2 ;;
    --part) parts+=("$2") ;;
    --plans) plans=(--plans "$2") ;;
    *) echo "gpus.sh: unknown option $1; --help lists the options" >&2 && exit 2 ;;
    esac
    shift 2
done
[ ${#parts[@]} -gt 0 ] || parts=(plans bandwidth overlap layouts)
[ -n "$ranks" ] || ranks=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$ranks" -lt 2 ]; then
    echo "gpus.sh: $ranks ranks; several are needed (--ranks N; without GPUs they run on CPU)" >&2
    exit 2
fi
# both names of each: torch renamed them
export TORCH_FR_BUFFER_SIZE=20000 TORCH_NCCL_TRACE_BUFFER_SIZE=20000
export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export TORCH_FR_DUMP_TEMP_FILE=$PWD/.flight-recorder-rank
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$TORCH_FR_DUMP_TEMP_FILE
export PYTHONPATH=$PWD:$PWD/.gpu-site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
for part in "${parts[@]}"; do
    echo "== $part"
    status=0
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" tools/gpus.py \
        --part "$part" --json "$json" "${plans[@]}" || status=$?
    [ $status -eq 0 ] || "$python" tools/gpus.py --part "$part" --json "$json" --ended "$status"
done
exec "$python" tools/gpu_rows.py "$json"
