#!/bin/sh
# First contact with a GPU: make first-gpu. Within nine minutes, on a machine with nvcc, torch, Triton, pytest-benchmark, -xdist and no
# network: what tells most comes first, every stage has its time, and what it printed is in the results when it ends.
# PYTHON: the python that has torch. RESULTS: where the folder of this run goes.
set -u
PYTHON=${PYTHON:-python3}
out=${RESULTS:-benchmarks/results}/first-gpu-$(date +%Y-%m-%d-%H%M%S)
mkdir -p "$out"
failed=0

stage() {  # NAME SECONDS COMMAND …
  name=$1 limit=$2
  shift 2
  begin=$(date +%s)
  # Interrupted, pytest still tells what has failed.
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  [ $code -eq 0 ] || failed=1
  case $code in 0) how=passed ;; 124 | 137) how="stopped after its $limit s" ;; *) how="failed ($code)" ;; esac
  echo "$name: $how, $(($(date +%s) - begin)) s" | tee -a "$out/summary.txt"
  return $code
}

bench() {  # NAME SECONDS WHICH FILE
  stage "$1" "$2" "$PYTHON" -m pytest -q "benchmarks/$4" --device cuda -k "$3" --save-to "$out"
}

CAPABILITY='import torch; print("%d.%d" % torch.cuda.get_device_capability())'
stage machine 10 sh -c 'nvidia-smi; nvcc --version; "$0" -m torch.utils.collect_env' "$PYTHON"
TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c "$CAPABILITY" 2>/dev/null) && export TORCH_CUDA_ARCH_LIST  # of this device alone, in a third of the time
stage build 70 make --no-print-directory gpu-build PYTHON="$PYTHON" || exit 1
stage tests 240 make --no-print-directory test-gpu PYTHON="$PYTHON" GPU_WORKERS="$(nproc)"
bench weighted_sum 40 "T8 and (MiniLM or 88M or ViT-L) and not compile" bench_weighted_sum.py
bench coefficient_grad 40 "T8 and (MiniLM or 88M or ViT-L) and not compile" bench_coefficient_grad.py
bench softmax_kl 25 "grad and (4096x32000 or 8192x128256) and (cuda or triton)" bench_softmax_kl.py
bench ties 30 "MiniLM and T8" bench_ties.py
bench sam-step 50 "bf16 and (samerge or bare)" bench_merging.py
SMALL="cuda and (cancel or rows_may_lie_apart or nan)"
stage sanitizer 30 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m pytest -q -m gpu -k "$SMALL" \
  tests/ops/test_elected_sum.py tests/ops/test_weighted_sum.py tests/ops/test_softmax_kl.py
echo "the rest: make test-gpu, make bench-gpu, make bench-gpu-large; this run: $out"
exit $failed
