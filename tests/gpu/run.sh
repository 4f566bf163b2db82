#!/usr/bin/env bash
# Builds and runs every GPU test offline: tests/gpu/run.sh [OUT]. Needs torch, triton, nvcc, cmake,
# ninja, pybind11, setuptools, pytest and hypothesis on the machine, but no network.
#
# The time goes into compiling Triton kernels, so the tests are spread over several processes
# ($D2M_SHARDS, a half of the cores), the ones that need no build start beside it, and all of it
# ends after $D2M_GPU_SECONDS (460): what was not reached by then is in the logs as not run. A
# verdict is printed, and its log is complete, as soon as a part has ended.
# D2M_GPU_BUILD=0: use the installed extensions.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/gpu-tests}
mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out"/*.log "$out"/*.rc
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$out/triton}" PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 # the shards are the threads
deadline=$((SECONDS + ${D2M_GPU_SECONDS:-460}))
cores=$(nproc)
shards=${D2M_SHARDS:-$((cores > 3 ? cores / 2 : 1))}

part() { # part NAME SECONDS COMMAND...: its log in $out/NAME.log, its verdict here
  local name=$1 limit=$2 rc left=$((deadline - SECONDS)) from=$SECONDS
  shift 2
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -gt 0 ]; then
    # INT first: pytest then still says what has passed and failed so far.
    timeout -s INT -k 10 "$limit" "$@" >"$out/$name.log" 2>&1
    rc=$?
  else
    echo "not run: the time was over" >"$out/$name.log"
    rc=124
  fi
  [ $rc -ne 5 ] || rc=0 # pytest: a shard without a test
  echo $rc >"$out/$name.rc"
  printf '%-14s rc=%-3s %4ss  %s\n' "$name" "$rc" $((SECONDS - from)) "$(tail -n 1 "$out/$name.log")"
}

tests() { # tests NAME BACKENDS SHARDS: starts them, pytest of a share each
  local i
  for ((i = 0; i < $3; i++)); do
    D2M_SHARD="$i/$3" D2M_TEST_BACKENDS=$2 part "$1-$i" 420 \
      python3 -m pytest -v -rs --durations=10 --maxfail=20 -p no:cacheprovider tests/gpu &
  done
}

export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
tests triton triton,torch "$shards"
if [ "${D2M_GPU_BUILD:-1}" = 1 ]; then
  part build 240 env D2M_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0a}" \
    python3 -m pip install --no-build-isolation --no-deps --target "$out/site" --upgrade .
  export PYTHONPATH="$PYTHONPATH:$out/site"
fi
part report 60 python3 -m d2m_kernels &
tests cuda cuda 2
# Once without a tool: the tools below then find every Triton kernel compiled.
part kernels 120 python3 tests/gpu/sanitize.py
sanitizer=$(command -v compute-sanitizer || true)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    # A tool that cannot attach fails: it requires, unless told otherwise, that CUDA is initialised.
    part "$tool" 120 "$sanitizer" --tool "$tool" --error-exitcode 9 --kernel-name-exclude kns=cutlass \
      python3 tests/gpu/sanitize.py &
  done
else
  echo "compute-sanitizer: not found, memcheck and racecheck skipped"
fi
wait

failed=$(grep -Lx 0 "$out"/*.rc | xargs -rn 1 basename | sed 's/\.rc$//' | tr '\n' ' ')
[ -z "$failed" ] || { echo "failed or cut short: $failed(see $out/NAME.log)"; exit 1; }
echo "all parts passed in ${SECONDS}s"
