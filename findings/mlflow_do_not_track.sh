#!/usr/bin/env bash
# MLflow 3.17.2: DO_NOT_TRACK=1 does not switch its telemetry off; only the word "true" does.
#
# One would have guessed: 1, which is the value that the convention names (consoledonottrack.com: "export
# DO_NOT_TRACK=1") and that other tools heed. MLflow reads the variable and compares it with "true", so that a machine
# with the usual setting sends usage data, and nothing says so. MLFLOW_DISABLE_TELEMETRY takes both 1 and true.
#
# Whom it hurts: who forbids telemetry on a whole machine, or in an image, by the one common variable.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check mlflow-skinny==3.17.2
cat > "$folder/probe.py" <<'PY'
import mlflow
from mlflow.telemetry.utils import is_telemetry_disabled
print(f"mlflow {mlflow.__version__} telemetry is {'off' if is_telemetry_disabled() else 'on'}", end="")
PY
# An empty environment: in CI and under pytest MLflow's telemetry is off anyway. Nothing is sent here: a client sends
# when it is used, and the proxy leads nowhere.
ask() { env -i PATH="$PATH" HOME="$folder" HTTPS_PROXY=http://127.0.0.1:9 "$@" "$folder/venv/bin/python" "$folder/probe.py"; }
while read -r setting expected; do
    found=$(ask "$setting")
    echo "$found with $setting"
    [[ $found == *"$expected" ]]
done <<'CASES'
NOTHING=set on
DO_NOT_TRACK=1 on
DO_NOT_TRACK=true off
MLFLOW_DISABLE_TELEMETRY=1 off
MLFLOW_DISABLE_TELEMETRY=true off
CASES
