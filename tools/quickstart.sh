#!/usr/bin/env bash
# From nothing to a trained model: environment, corpus, two minutes of training on 2 ranks, plots.
# Usage: bash tools/quickstart.sh [--python python3.12]
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh

name=python3
if [ "${1:-}" = --python ]; then
    name=${2:?--python needs a name such as python3.12}
fi
base=$(find_python "$name")
make_environment .venv "$base" "[train]"
PATH=$PWD/.venv/bin:$PATH
export OMP_NUM_THREADS=1

echo
echo "== 1/4 the corpus: Python's own standard library"
megascale prepare data/python_stdlib.yaml

run=runs/quickstart
for ((number = 2; ; number++)); do # a run folder that exists is somebody's run: leave it alone
    [ -e "$run" ] || break
    run=runs/quickstart-$number
done

echo
echo "== 2/4 the run, before it starts: $run/plots/plan.png shows how step 0 is laid out"
mkdir -p "$run/plots"
megascale plan configs/quickstart.yaml --ranks 2 --gantt "$run/plots/plan.png" run_dir="$run"

echo
echo "== 3/4 training on 2 ranks"
megascale train configs/quickstart.yaml --ranks 2 run_dir="$run"

echo
echo "== 4/4 plots"
megascale plot "$run"

cat <<END

Done. Next:
  . .venv/bin/activate
  megascale data check corpora/python_stdlib       look at the data
  megascale plan configs/quickstart.yaml --ranks 8 train.tokens=1B   what another run would be
  megascale train configs/quickstart.yaml --ranks 2 run_dir=$run train.tokens=4M --resume auto
                                                   train this one for longer
  megascale doctor                                 what this machine has
  tensorboard --logdir $run/tensorboard            curves, live
  bash tools/test.sh                               run the tests
END
