"""Schedules with one's own settings survive `rlhf up`, whoever made them."""

import json
import subprocess
import sys

import pytest

from flows.api_server import LOGIN

pytestmark = [pytest.mark.slow, pytest.mark.system]


def test_schedules_are_made_listed_kept_and_removed(system):
    (system.folder / "my.yaml").write_text("preset: smoke\npublish: {name: mine}\n")
    cron = ["--cron", "0 3 1 1 *", "--timezone", "Europe/Berlin", "--config", "my.yaml"]
    said = system.rlhf("schedule", *cron)
    assert "Schedule mine is made." in said and said.count("03:00:00 CET (+0100)") == 3
    assert "trains random:llama (sft, reward, ppo)" in said
    replaced = json.loads(system.rlhf("schedule", *cron, "--json").splitlines()[0])
    assert replaced["name"] == "mine"
    assert "did you mean ppo.kl_coef" in system.rlhf("schedule", *cron, "--set", "ppo.kl=1", code=1)
    deployment = system.get("/deployments/name/rlhf-retrain/retrain")
    address = f"/deployments/{deployment['id']}/schedules"
    nightly = next(s for s in deployment["schedules"] if s["slug"] == "nightly")
    by_hand = {"schedule": {"cron": "5 5 1 1 *"}, "active": True}  # as the UI makes them
    made = system.post(address, [by_hand])[0]["id"]
    system.ask("PATCH", f"{address}/{nightly['id']}", {"active": True})

    redeploy = [sys.executable, "-m", "flows.deploy"]
    server = {"PREFECT_API_URL": f"{system.url}/api", LOGIN: system.log_in()}
    environment = {**system.environment, **server}
    subprocess.run(redeploy, cwd=system.folder, env=environment, check=True, capture_output=True)

    lines = map(json.loads, system.rlhf("schedule", "--json").splitlines())
    found = {line["name"]: line for line in lines}
    assert set(found) == {"mine", "nightly", f"schedule-{made[:8]}"}
    assert all(line["active"] for line in found.values()), "nightly is still on"
    assert "trains builtin:smollm2-135m-instruct" in found["nightly"]["what"]
    system.ask("PATCH", f"{address}/{nightly['id']}", {"active": False})
    for name in ("mine", f"schedule-{made[:8]}"):
        assert "is removed" in system.rlhf("schedule", "--remove", name)
    assert "There is no schedule 'mine'; there are: nightly" in system.rlhf(
        "schedule", "--remove", "mine", code=1
    )
