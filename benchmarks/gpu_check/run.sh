#!/usr/bin/env bash
# Runs the check on a machine with a GPU and without network. Its Python has torch, transformers and
# peft; the rest comes from the wheels that `make gpu-check-wheels` downloaded.
#
#     bash benchmarks/gpu_check/run.sh OUT [WHEELS]
#
# OUT gets gpu-check.json and log.txt. PYTHON names another Python than python3; options for the
# check itself, such as --parts or --limit, go into OPTIONS.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: run.sh OUT [WHEELS]} wheels=${2:-.gpu-check-wheels} python=${PYTHON:-python3}
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if compgen -G "$wheels/*.whl" > /dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --target "$scratch/site" "$wheels"/*.whl
fi
export PYTHONPATH="$PWD:$scratch/site" PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
"$python" -m benchmarks.gpu_check --device "${DEVICE:-cuda}" --out "$out/gpu-check.json" \
  ${OPTIONS:-} 2>&1 | tee "$out/log.txt"
