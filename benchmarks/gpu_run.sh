#!/usr/bin/env bash
# Everything that only a GPU can show, unattended and offline, in under ten minutes: the build, the tests, races and
# memory errors by compute-sanitizer, `dalle-fast verify --gpu`, and the benchmarks of README's GPU tables.
#
#     benchmarks/gpu_run.sh [FOLDER]     results go to FOLDER, benchmarks/results/gpu by default
#
# Needs torch, Triton, CMake, Ninja, pybind11, pytest and nvcc on the machine. A step that fails or takes too long does
# not stop the others; the last lines say how each ended, and the exit status is the number of those that failed or were
# not run. Written before a GPU was at hand: it has not run on one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=$(realpath -m "${1:-benchmarks/results/gpu}")
mkdir -p "$results"
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
seconds_allowed=580
failed=0
summary=()

# step NAME SECONDS COMMAND...: its output goes to NAME.log as well; less than SECONDS where less time is left in all
step() {
    local name=$1 seconds=$2 start=$SECONDS status=0 left=$((seconds_allowed - SECONDS))
    if [ "$left" -lt 10 ]; then
        failed=$((failed + 1))
        summary+=("$(printf '%-14s not run, out of time' "$name")")
        return
    fi
    [ "$seconds" -le "$left" ] || seconds=$left
    printf '\n== %s (%d s so far)\n' "$name" "$SECONDS"
    timeout --kill-after=10 "$seconds" "${@:3}" 2>&1 | tee "$results/$name.log" || status=$?
    [ "$status" -eq 0 ] || failed=$((failed + 1))
    summary+=("$(printf '%-14s %4d s  %s' "$name" $((SECONDS - start)) \
        "$([ "$status" -eq 0 ] && echo ok || echo "ended with $status")")")
}

step build 120 "$python" -m pip install -q -e . --no-build-isolation --no-deps
step info 30 "$python" -m dalle_fast info
step attention 60 "$python" benchmarks/attn_bench.py --quick --dtype bfloat16 --batch 16 --heads 16 \
    --json "$results/attn_quick.json"
step tests 120 "$python" -m pytest tests -q -x -k "cuda or triton and not compile and not interpreter" \
    --ignore=tests/test_benchmark.py --ignore=tests/test_build.py
step sanitizer 60 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$python" -m dalle_fast.verify.worker diff cuda 0 24
step racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 9 \
    "$python" -m dalle_fast.verify.worker diff cuda 3 12
step verify 90 "$python" -m dalle_fast verify diff error causal repeat sampler --gpu --budget 80 \
    --out "$results/verify_gpu.json"
for grid in 32 64 128; do
    step "attn_$grid" 60 "$python" benchmarks/attn_bench.py --dtype bfloat16 --batch 16 --heads 16 --grid "$grid" \
        --json "$results/attn_$grid.json" --plot "$results/attn_$grid.png"
done
step codebook 60 "$python" benchmarks/codebook_bench.py --json "$results/codebook.json" --plot "$results/codebook.png"
for bench in generate train; do
    if [ -e "benchmarks/${bench}_bench.py" ]; then
        step "$bench" 90 "$python" "benchmarks/${bench}_bench.py" --json "$results/$bench.json"
    fi
done

printf '\n'
printf '%s\n' "${summary[@]}" | tee "$results/summary.txt"
exit "$failed"
