#!/usr/bin/env bash
# Prefect 3.9.1: `prefect deploy` deletes the schedules that were made in the UI, and switches the others off again.
#
# One would have guessed: deploying again brings the schedules of prefect.yaml up to date by their slugs, and leaves what
# people have made or switched on in the UI. So it does while every schedule of the deployment has a slug. The UI asks for
# none. With one schedule without a slug the whole set is replaced by that of prefect.yaml, without a word; and `active:
# false`, which ships a schedule that is off until somebody wants it, switches it off at each deployment.
#
# Whom it hurts: who deploys at each start or in CI, and schedules in the UI: the nightly run is gone from then on.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check prefect==3.9.1
export PREFECT_HOME="$folder/home" PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 PATH="$folder/venv/bin:$PATH"
cat > "$folder/flow_of_probe.py" <<'PY'
from prefect import flow

@flow
def probe(): ...
PY
cat > "$folder/prefect.yaml" <<'YAML'
name: probe
pull: [{ prefect.deployments.steps.set_working_directory: { directory: "." } }]
deployments:
  - name: probe
    entrypoint: flow_of_probe.py:probe
    work_pool: { name: pool }
    schedules: [{ slug: nightly, cron: "0 3 * * *", timezone: UTC, active: false }]
YAML
cat > "$folder/run.py" <<'PY'
import os, subprocess, sys
import prefect
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

with prefect_test_harness(server_startup_timeout=120):
    client, url = get_client(sync_client=True), PREFECT_API_URL.value()
    client.create_work_pool(WorkPoolCreate(name="pool", type="process"))

    def deploy():
        subprocess.run([sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"], check=True,
                       capture_output=True, env={**os.environ, "PREFECT_API_URL": url})
        return client.read_deployment_by_name("probe/probe")

    def shown(deployment):
        return sorted((s.slug or "made in the UI", s.active) for s in deployment.schedules)

    made = deploy()
    client.update_deployment_schedule(made.id, made.schedules[0].id, active=True)
    print(f"prefect {prefect.__version__}, switched on, and deployed again: {shown(deploy())}")
    assert shown(client.read_deployment_by_name("probe/probe")) == [("nightly", False)]
    client.create_deployment_schedules(made.id, [(CronSchedule(cron="0 4 * * *"), True)])
    print(f"before: {shown(client.read_deployment_by_name('probe/probe'))}")
    after = shown(deploy())
    print(f"deployed again: {after}")
    assert after == [("nightly", False)]
PY
cd "$folder" && python run.py 2>/dev/null
