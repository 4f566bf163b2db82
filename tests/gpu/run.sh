#!/usr/bin/env bash
# Builds and runs every GPU test offline: tests/gpu/run.sh [OUT]. Needs torch, triton, nvcc, cmake,
# ninja, pybind11, setuptools, pytest and hypothesis on the machine, but no network.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/gpu-tests}
mkdir -p "$out"
status=0
part() { # part NAME SECONDS COMMAND...: its log in $out/NAME.log, its verdict here
  local name=$1 limit=$2
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  [ $rc -eq 0 ] || status=1
  printf '%-14s rc=%s  %s\n' "$name" "$rc" "$(tail -n 1 "$out/$name.log")"
}

part build 240 env D2M_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0a}" \
  python3 -m pip install --no-build-isolation --no-deps --target "$out/site" --upgrade .
export PYTHONPATH="$PWD:$PWD/tests:$(cd "$out" && pwd)/site"
part report 60 python3 -m d2m_kernels
part layer 300 python3 -m pytest -q -x --maxfail=20 -p no:cacheprovider tests/gpu
sanitizer=$(command -v compute-sanitizer || true)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    # --require-cuda-init=no: a tool that cannot attach must fail loudly, not report nothing.
    part "$tool" 120 "$sanitizer" --tool "$tool" --error-exitcode 9 --kernel-name-exclude kns=cutlass \
      python3 tests/gpu/sanitize.py
  done
else
  echo "compute-sanitizer: not found, memcheck and racecheck skipped"
fi
exit $status
