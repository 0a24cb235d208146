#!/usr/bin/env bash
# Everything that only a GPU can show, unattended and offline, in under ten minutes: the build, the tests, races and
# memory errors by compute-sanitizer, `dalle-fast verify --gpu`, and the benchmarks of the GPU tables in RESULTS.md.
#
#     benchmarks/gpu_run.sh [FOLDER]     results go to FOLDER, benchmarks/results/gpu by default
#
# Needs torch, Triton, CMake, Ninja, pybind11, pytest and nvcc on the machine; with pytest-xdist the tests run side by
# side. What compiles or checks comes first, all at once, and fills the compilers' caches; then each benchmark has the GPU
# to itself. A step that fails or takes too long does not stop the others; the last lines say how each ended, and the exit
# status is the number of those that failed or were not run. SECONDS_ALLOWED and STEPS (a regular expression of names)
# shorten it. On an H200 with 16 cores (2026-11-27) the tests, 12 at a time beside two compiling benchmarks, had done 994
# of 1,001 in 248 s; where a machine is lent for less than all steps take, these two calls go well together:
#
#     STEPS='^(info|tests|attn_32|generate)$' benchmarks/gpu_run.sh
#     STEPS='^(attn_64|train|codebook.*)$' benchmarks/gpu_run.sh
set -uo pipefail
results=${1:+$(realpath -m "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${results:-$PWD/benchmarks/results/gpu}
mkdir -p "$results"
export PYTHONUNBUFFERED=1 PATH="/usr/local/cuda/bin:$PATH"
python=${PYTHON:-python3}
seconds_allowed=${SECONDS_ALLOWED:-580}
wanted=${STEPS:-.}
failed=0
names=()
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    # Else tests skip what is asked of them, figures are not run, benchmarks measure the CPU: all of it with status 0.
    echo "nothing was run: torch finds no GPU here" >&2
    exit 1
fi

# step NAME SECONDS COMMAND...: its output goes to NAME.log, its end to the summary; less than SECONDS where less is left
step() {
    local name=$1 seconds=$2 start=$SECONDS status=0 left=$((seconds_allowed - SECONDS))
    [[ $name =~ $wanted ]] || return 0
    if [ "$left" -lt 10 ]; then
        echo "not run, out of time" > "$results/.$name"
        return
    fi
    [ "$seconds" -le "$left" ] || seconds=$left
    # By Ctrl-C, which a shell's background processes ignore by default: tests and benchmarks then say what they have. With
    # less than 30 s for that, failures of tests were lost, as each process first ends the test that it is at.
    timeout --signal=INT --kill-after=30 "$seconds" env --default-signal=INT "${@:3}" > "$results/$name.log" 2>&1 || status=$?
    printf '%4d s  %s\n' $((SECONDS - start)) "$([ "$status" -eq 0 ] && echo ok || echo "ended with $status")" \
        > "$results/.$name"
    printf '%-14s at %3d s: %s\n' "$name" "$SECONDS" "$(cat "$results/.$name")"
}

# announce NAME...: the steps of the summary, in its order
announce() { names+=("$@"); }

# warm NAME COMMAND...: the same benchmark with next to no timing, for what it compiles
warm() {
    [[ $1 =~ $wanted ]] || return 0
    wanted=. step "warm_$1" 170 "${@:2}" --seconds 0.01
}

paper=(--dtype bfloat16 --batch 16 --heads 16)
large=("${paper[@]}" --mask row --mask conv:11 --flex-block 128)
attn_32=("$python" benchmarks/attn_bench.py "${paper[@]}" --seconds 2)
attn_64=("$python" benchmarks/attn_bench.py "${large[@]}" --grid 64 --seconds 2)
attn_128=("$python" benchmarks/attn_bench.py "${large[@]}" --grid 128 --pass forward --seconds 3)
codebook=("$python" benchmarks/codebook_bench.py)
codebook_triton=("${codebook[@]}" --impl triton)
generate=("$python" benchmarks/generate_bench.py --preset 1b --batch 64 --batch 8 --batch 1 --seconds 2)
train=("$python" benchmarks/train_bench.py --grid 32 --grid 64 --seconds 3)
benchmarks=(attn_32 attn_64 attn_128 codebook codebook_triton generate train)

announce build info tests memcheck racecheck verify "${benchmarks[@]}"
step build 150 "$python" -m pip install -q -e . --no-build-isolation --no-deps
step info 30 "$python" -m dalle_fast info

parallel=()
"$python" -c 'import xdist' 2> /dev/null && parallel=(-n 12)
OMP_NUM_THREADS=2 step tests 280 "$python" -m pytest tests -v "${parallel[@]}" -p no:cacheprovider --tb=short \
    -k "(cuda or triton or gpu) and not host" --ignore=tests/test_benchmark.py --ignore=tests/test_build.py \
    --ignore=tests/test_triton_compile.py --ignore=tests/test_cuda_compile.py --ignore=tests/test_triton_cover.py \
    --ignore=tests/test_triton_interpreter.py --ignore=tests/test_codebook_cuda_host.py &
# --strict: cases that found no GPU, or failed before a kernel ran, show no sanitizer anything.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 step memcheck 170 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$python" -m dalle_fast.verify.worker diff cuda 0 16 --strict &
step verify 200 "$python" -m dalle_fast verify gpu --gpu --budget 170 --restart --out "$results/verify_gpu.json" &
step racecheck 170 compute-sanitizer --tool racecheck --error-exitcode 9 \
    "$python" -m dalle_fast.verify.worker diff cuda 16 24 --strict &
for name in "${benchmarks[@]}"; do
    declare -n command=$name
    warm "$name" "${command[@]}" &
done
wait

for name in "${benchmarks[@]}"; do
    declare -n command=$name
    step "$name" 120 "${command[@]}" --json "$results/$name.json" --plot "$results/$name.png"
done

for name in "${names[@]}"; do
    [[ $name =~ $wanted ]] || continue
    ended=$(cat "$results/.$name" 2> /dev/null || echo "not run")
    [[ $ended == *ok ]] || failed=$((failed + 1))
    printf '%-14s %s\n' "$name" "$ended"
done > "$results/summary.txt"
rm -f "$results"/.[a-z]*
printf '\n'
cat "$results/summary.txt"
exit "$failed"
