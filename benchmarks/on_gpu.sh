#!/usr/bin/env bash
# The figures of a GPU in one command, within eight minutes:  bash benchmarks/on_gpu.sh [FOLDER] [--quick]
#
# Needs this checkout and a Python with torch: python3, or the one that PYTHON names. FOLDER (gpu_figures) must be new or
# empty. Each part is a process with a time of its own and writes one file there, after each case, so that what fails,
# takes long or is killed costs only itself. --quick takes the smallest sizes, and runs without a GPU too: it shows that
# every part works, and its figures mean nothing. benchmarks/README.md tells what the parts are.
set -uo pipefail

most_seconds=470 # for everything
start_seconds=10 # that a process needs before it measures
late_seconds=20  # that a case which is under way may take when its part's time is over

refuse() {
  echo "$1" >&2
  exit 2
}

say() { printf '\n== %s (%ss)\n' "$*" "$SECONDS"; }

# -- arguments ----------------------------------------------------------------------------------------------------------

folder='' size=()
for argument in "$@"; do
  case $argument in
    --quick) size=(--smallest) ;;
    -* | '') refuse "The arguments must be [FOLDER] [--quick], got '$argument'." ;;
    *)
      [ -z "$folder" ] || refuse "There must be one FOLDER, got '$folder' and '$argument'."
      folder=$argument
      ;;
  esac
done
folder=${folder:-gpu_figures}
mkdir -p -- "$folder" || refuse "FOLDER must be a folder that can be made, got '$folder'."
[ -z "$(ls -A -- "$folder")" ] || refuse "FOLDER must be new or empty, got '$folder'. Name another one."
folder=$(cd -- "$folder" && pwd)
python=$(type -P -- "${PYTHON:-python3}") || refuse "PYTHON must be a Python, got '${PYTHON:-python3}'."
[[ $python == /* ]] || python=$PWD/$python

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1
device=$("$python" -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")' 2>> "$folder/log.txt") ||
  refuse "PYTHON must be able to import torch, and '$python' is not: see '$folder/log.txt'."
[ "$device" = cuda ] || [ "${#size[@]}" -gt 0 ] || refuse "torch finds no GPU here. With --quick the CPU will do."

# -- parts --------------------------------------------------------------------------------------------------------------

child='' failed=()
trap 'kill "$child" 2> /dev/null; wait; exit 143' INT TERM

# bounded NAME SECONDS COMMAND...: run it, and stop it when it takes too long.
bounded() {
  local name=$1 bound=$2 left=$((most_seconds - SECONDS))
  shift 2
  timeout --kill-after=5 "$((bound < left ? bound : left > 1 ? left : 1))" "$@" &
  child=$!
  wait "$child"
  local code=$?
  [ "$code" -ne 124 ] && [ "$code" -ne 137 ] || echo "$name was stopped: its time was over."
  [ "$code" -eq 0 ] || failed+=("$name")
}

# measure NAME SECONDS PATTERN...: the cases of these names into NAME.json, their table to the screen, the rest to log.txt.
measure() {
  local name=$1 seconds=$2 only=()
  shift 2
  for pattern in "$@"; do only+=(--only "$pattern"); done
  local left=$((most_seconds - SECONDS - late_seconds))
  seconds=$((seconds < left ? seconds : left))
  say "$name: $*"
  echo "== $name" >> "$folder/log.txt"
  bounded "$name" $((seconds + late_seconds)) "$python" -m benchmarks --device "$device" --peers "${size[@]}" \
    --seconds $((seconds > start_seconds ? seconds - start_seconds : 1)) --json "$folder/$name.json" "${only[@]}" \
    2>> "$folder/log.txt"
}

[ "$device" = cpu ] || export REQUIRE_GPU=1
say "1_tests on $device"
bounded 1_tests 90 "$python" -m pytest -p no:cacheprovider -q -m gpu tests/test_gpu*.py > "$folder/1_tests.txt" 2>&1
tail -n 5 -- "$folder/1_tests.txt"
measure 2_hooks 60 'captured_call.*' 'pooled_call.*'
measure 3_device 50 'copy.*' 'device_memory.*' 'synchronisations.*'
measure 4_llama 160 'llama.*' 'llama_memory.*'
measure 5_compiled 80 'compiled.*' 'taps.*'
measure 6_rest "$most_seconds" 'set_up.*' 'block.*' 'transformer.*' 'early_stop.*' 'cnn.*' 'generate.*' 'layers.*' \
  'threads.*' 'extract.*' 'save.*' peer.output_hidden_states

say "done: $folder"
if [ "${#failed[@]}" -gt 0 ]; then
  echo "Failed: ${failed[*]}. What was found is stored; log.txt says why." >&2
  exit 1
fi
