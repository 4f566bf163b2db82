#!/usr/bin/env bash
# Everything on a GPU in one go, offline, in under nine minutes:
#
#   benchmarks/gpu.sh OUT [--only PART...] [--budget SECONDS] [--wheels DIR] [--rehearse]
#   benchmarks/gpu.sh --missing
#
# Parts, in order of importance; a run cut short keeps what it has measured:
#   build tests layers stages models skewed blocks distill host scaling shapes
# and with --only alone: first sweep. A GPU that has never run this code:
#   benchmarks/gpu.sh OUT --only first sweep    is each stage right, and which tiles are fast
#   tests/gpu/run.sh                            is everything right
#   D2M_TRITON_CONFIG=... benchmarks/gpu.sh OUT with the winners pinned
# OUT gets <gpu>.json (see README.md here; renewed after every measurement), gpu.log with the output
# of all parts, and first.json and sweep.json of those. `draw.py --results OUT` makes the report of it, on any
# machine. D2M_COMMIT names the commit where the tree came without its history.
#
# The machine needs nvcc, torch >= 2.11, triton, numpy and pytest. All else that is used is listed
# in gpu-wheels.txt; --missing prints those lines of it that the machine lacks, which travel as
# wheels, made where there is a network (same Python version, Linux of the same kind):
#   pip download --no-deps --only-binary=:all: -d wheels -r missing.txt
# --wheels wheels installs exactly these, for this run alone. Further peers that are measured where
# they are there: torchao (fp8), scattermoe, megablocks, sonic-moe, triton_kernels. Without
# pytest-benchmark nothing is measured; what else a part lacks is in its records under "skipped".
# --rehearse: the same on a CPU with tiny sizes; its numbers mean nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
usage() { # the comment above
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' benchmarks/gpu.sh
  exit "${1:-2}"
}

all="build tests layers stages models skewed blocks distill host scaling shapes"
out="" only="" budget=530 wheels="" rehearse=0 missing=0
while [ $# -gt 0 ]; do
  case $1 in
    --only) shift; while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do only="$only $1"; shift; done; continue ;;
    --budget) budget=${2:?--budget needs seconds}; shift ;;
    --wheels) wheels=${2:?--wheels needs a folder}; shift ;;
    --rehearse) rehearse=1 ;;
    --missing) missing=1 ;;
    -h | --help) usage 0 ;;
    -*) echo "unknown option $1" >&2; usage ;;
    *) [ -z "$out" ] || usage; out=$1 ;;
  esac
  shift
done
python=$(command -v python3)
[ "$rehearse$missing" = 00 ] || python=${PYTHON:-$python}
if [ "$missing" = 1 ]; then
  exec "$python" - benchmarks/gpu-wheels.txt <<'END'
import re
import sys
from importlib import metadata


def numbers(version):
    return [int(n) for n in re.findall(r"\d+", version)[:2]]


for line in open(sys.argv[1]):
    listed = re.match(r"(.+)==\S+(?:  # (\S+) or later)?$", line)
    if listed is None:
        continue
    name, least = listed.groups()
    there = next(iter(metadata.distributions(name=name)), None)
    if there is None or numbers(there.version) < numbers(least or "0"):
        print(line, end="")
END
fi
[ -n "$out" ] || usage
for part in $only; do
  case " $all first sweep " in *" $part "*) ;; *) echo "unknown part $part; parts: $all first sweep" >&2; exit 2 ;; esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/gpu.log
: >"$log"
site=$PWD/build/gpu-site carried=$PWD/build/gpu-wheels
rm -rf "$carried"
if [ -n "$wheels" ]; then
  # not compiled: most of their modules are never imported
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$carried" \
    "$wheels"/*.whl >>"$log" 2>&1 ||
    { echo "the wheels in $wheels could not be installed, see $log"; exit 1; }
  export PATH="$carried/bin:$PATH"
fi
export PYTHONPATH="$site:$carried:$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
size=() first=() sweep=()
if [ "$rehearse" = 1 ]; then size=(--tiny --on cpu) first=(--rehearse) sweep=(--rehearse --tiles 2); fi

status=0
wanted() { [ -z "$only" ] && [[ " $all " == *" $1 "* ]] || [[ " $only " == *" $1 "* ]]; }
left() { echo $((budget - SECONDS)); }
part() { # part NAME SECONDS COMMAND...: within what is left of the budget; its verdict on a line
  local name=$1 limit=$2 rc
  shift 2
  wanted "$name" || return 0
  [ "$limit" -lt "$(left)" ] || limit=$(left)
  if [ "$limit" -lt 5 ]; then
    echo "$name: not started, the budget of $budget s is used up"
    return 0
  fi
  local start=$SECONDS
  echo "== $name: $*" >>"$log"
  timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1
  rc=$?
  [ $rc -eq 0 ] || status=1
  printf '%-8s rc=%-3s %4s s  %s\n' "$name" $rc $((SECONDS - start)) "$(tail -n 1 "$log" | cut -c1-110)"
}
bench() { # bench NAME SECONDS FILE [PYTEST_ARGUMENTS...]: starts no test after 80% of its time
  local name=$1 limit=$2
  shift 2
  local most=$limit
  [ "$most" -lt "$(left)" ] || most=$(left)
  if [ "$plugin" = 0 ]; then
    ! wanted "$name" || { echo "$name: not measured, needs pytest-benchmark (see --help)"; status=1; }
    return 0
  fi
  part "$name" "$limit" "$python" -m pytest "$@" --benchmark-only -q -p no:cacheprovider \
    --results "$out/" --deadline $((most * 8 / 10)) "${size[@]}"
}

plugin=1
"$python" -c 'import pytest_benchmark' 2>>"$log" || plugin=0
cuda=1
[ "$rehearse" = 0 ] || cuda=0
part first 200 "$python" benchmarks/first_run.py "$out/first.json" --budget 180 "${first[@]}"
part build 150 env D2M_CUDA=$cuda TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0a}" \
  "$python" -m pip install --no-build-isolation --no-deps --target "$site" --upgrade .
# The clone shadows the installed packages, so that this tree is what runs; only the compiled
# modules come from the site folder.
if [ "$rehearse" = 1 ]; then # nothing to run without a GPU: every test says why it is skipped
  part tests 120 "$python" -m pytest -q -p no:cacheprovider tests/gpu
else
  part tests 130 env D2M_GPU_BUILD=0 D2M_GPU_SECONDS=115 tests/gpu/run.sh "$out/tests"
fi
bench layers 110 benchmarks/bench_moe_ffn.py -k "balanced and (4608 or 1536)"
bench stages 60 benchmarks/bench_route.py benchmarks/bench_grouped_gemm.py benchmarks/bench_combine.py -k "4608 or 1536"
bench models 240 benchmarks/bench_flux.py
bench skewed 45 benchmarks/bench_moe_ffn.py -k "zipf and (4608 or 1536)"
bench blocks 40 benchmarks/bench_blocks.py
bench distill 60 benchmarks/bench_distill.py
bench host 30 benchmarks/bench_host.py
bench scaling 60 benchmarks/bench_scaling.py
bench shapes 120 benchmarks/bench_moe_ffn.py benchmarks/bench_route.py benchmarks/bench_grouped_gemm.py \
  benchmarks/bench_combine.py -k "not (4608 or 1536)"
part sweep "$budget" "$python" benchmarks/sweep_triton.py "$out/sweep.json" --budget "$(left)" "${sweep[@]}"
echo "results in $out after $SECONDS s"
exit $status
