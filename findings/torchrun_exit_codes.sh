#!/usr/bin/env bash
# torch 2.13.0, torchrun: its own exit status is 1 whatever its ranks say, also after SIGTERM when every rank has ended with 0.
#
# One would have guessed: the status of the rank that failed first is torchrun's, as a shell or `env` passes it on, and after
# SIGTERM, which torchrun hands to its ranks, ranks that have stored a checkpoint and end with 0 make it 0, or 143 as the
# signal itself would. It is 1 with a traceback of torchrun in each case, the same as after a mistake in the script. The codes
# stand in the text of its log only, and max-restarts starts a rank again whatever it has said.
#
# Whom it hurts: who lets a scheduler act on exit codes: podFailurePolicy's onExitCodes of a Kubernetes Job or JobSet ("42:
# a wrong setting, do not retry"), or Slurm's RequeueExit. A clean end at a preemption counts as a failure. What helps: ranks
# write their outcome to a file, and a wrapper around torchrun ends with what it says.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > ends.py <<'PY'
import os, sys
if os.environ["RANK"] == "1":
    print("started", file=open("starts", "a"))
    sys.exit(int(os.environ["CODE"]))
PY
cat > stops.py <<'PY'
import pathlib, signal, sys, time
def stop(*rest):
    pathlib.Path("stored").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("ready").touch()
time.sleep(600)
PY
torchrun() { "$folder/venv/bin/python" -m torch.distributed.run --standalone "$@"; }
echo "torch $(venv/bin/python -c 'import torch; print(torch.__version__)')"
for code in 3 42; do
  found=0; CODE=$code torchrun --nproc-per-node 2 ends.py > log 2>&1 || found=$?
  echo "a rank ends with $code: torchrun ends with $found; its log says $(grep -o "exitcode *: $code" log | head -1)"
  [[ $found == 1 ]] && grep -q "exitcode *: $code" log
done
rm starts; CODE=42 torchrun --nproc-per-node 2 --max-restarts 2 ends.py > log 2>&1 || true
echo "max-restarts 2, and a rank that ends with 42 each time: started $(wc -l < starts) times"
[[ $(wc -l < starts) == 3 ]]
"$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 1 stops.py > log 2>&1 & pid=$!
for _ in $(seq 600); do [[ -e ready ]] && break; sleep 0.5; done
kill -TERM $pid; found=0; wait $pid || found=$?
echo "SIGTERM, and the rank stores and ends with 0 ($(ls stored)): torchrun ends with $found: $(tail -1 log)"
[[ -e stored && $found == 1 ]]
