#!/usr/bin/env bash
# Measures every operation on one GPU, in plain XLA and with the Triton kernels, in at most ten minutes after its
# installation, and prints the tables; every number also goes to RESULTS/*.json with device, versions, commit and date.
#
#     launch/measure_gpu.sh RESULTS
#
# Beyond Python 3.11 with pip and a driver for CUDA 12 it needs only what it installs: jax[cuda12], jax-triton, triton, and
# for the kernels' own tests pytest, pytest-xdist, beartype and hypothesis. PYTHON=... takes an interpreter that has them.
#
# What runs: the kernels' tests on the device (are they right?), then each benchmark once in plain XLA and once with
# Triton. A step that takes longer than its share is cut off and said so; the others go on.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
results=${1:?say where the results go: launch/measure_gpu.sh RESULTS}
mkdir -p "$results" || exit 2
python=${PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv .venv-gpu && .venv-gpu/bin/pip install --quiet --editable '.[gpu]' pytest pytest-xdist beartype hypothesis || exit 2
  python=$PWD/.venv-gpu/bin/python
fi

step() { # SECONDS NAME COMMAND...
  local seconds=$1 name=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" 2>"$results/$name.log" || echo "== $name: status $?, of $seconds s at most; see $results/$name.log"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
RETENTION_JAX_TEST_DEVICE=1 step 90 tests "$python" -m pytest -q tests/kernels/test_device.py

bench() { # SECONDS COMMAND FLAGS...
  local seconds=$1 command=$2
  shift 2
  for kernels in xla triton; do
    RETENTION_JAX_KERNELS=$kernels step "$seconds" "$command-$kernels" \
      "$python" launch/benchmark.py "$command" "$@" --repeats=3 "--output=$results/$command-$kernels.json"
  done
}

# One layer's shapes of Qwen3-4B for single operations; all its layers where the whole is measured.
bench 45 attention --model=qwen3_4b --layers=1 --contexts=4096,32768
bench 35 mass --model=qwen3_4b --layers=4 --contexts=4096,32768
bench 35 evict --model=qwen3_4b --budgets=1024,4096
bench 60 decode --model=qwen3_4b --batches=4 --contexts=32768 --budgets=1024 --new_tokens=128
bench 50 train --model=qwen3_0_6b --contexts=8192 --labels=0.1
