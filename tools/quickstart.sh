#!/usr/bin/env bash
# From nothing to a trained model: environment, corpus, two minutes of training, in which static
# context parallelism is measured against hybrid, and plots.
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
echo "== 1/5 the corpus: Python's own standard library"
megascale prepare data/python_stdlib.yaml

run=runs/quickstart
for ((number = 2; ; number++)); do # a run folder that exists is somebody's run: leave it alone
    [ -e "$run" ] || break
    run=runs/quickstart-$number
done

echo
echo "== 2/5 the run, before it starts: $run/plots/plan.png shows how step 0 is laid out"
mkdir -p "$run/plots"
config=configs/mixed_lengths.yaml
small=data.global_batch_tokens=2Ki # more steps in the same time, so that the model learns more
megascale plan "$config" --ranks 2 --gantt "$run/plots/plan.png" run_dir="$run" "$small"

echo
echo "== 3/5 training on 2 ranks"
megascale train "$config" --ranks 2 run_dir="$run" "$small"

echo
echo "== 4/5 plots"
megascale plot "$run"

echo
echo "== 5/5 static context parallelism against hybrid on 4 ranks, on the same batches of that corpus"
megascale demo --ranks 4 --out "$run/demo"

cat <<END

Done. Next:
  . .venv/bin/activate
  megascale data check corpora/python_stdlib       look at the data
  megascale plan $config --ranks 8 train.tokens=1B   what another run would be
  megascale train $config --ranks 2 run_dir=$run $small train.tokens=1M --resume auto
                                                   train this one for longer
  megascale demo --ranks 2                         the comparison on another number of ranks
  megascale doctor                                 what this machine has
  tensorboard --logdir $run/tensorboard            curves, live
  bash tools/test.sh                               run the tests
END
