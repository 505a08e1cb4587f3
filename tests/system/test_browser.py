"""What people click, in a real Chromium against the real server."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.system.conftest import until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.system,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture
def stranger(tmp_path):
    """A page of a browser that nobody has logged in with."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        found = browser.new_page(viewport={"width": 1400, "height": 1300})
        found.set_default_timeout(20_000)
        yield found
        found.screenshot(path=tmp_path / "last.png")
        browser.close()


@pytest.fixture
def page(stranger, system):
    """A page after the login, as `rlhf up` describes it."""
    stranger.goto(system.url)
    stranger.get_by_placeholder("admin:pass").fill(system.log_in())
    stranger.get_by_role("button", name="Login").click()
    stranger.get_by_text("Dashboard").first.wait_for()
    return stranger


def field(page, label):
    """The innermost part of the form with this label."""
    title = page.locator("> .p-label__header .schema-form-property__label", has_text=label)
    return page.locator(".schema-form-property").filter(has=title).first


def choose(page, label, option):
    button = field(page, label).locator("button.p-select-button__control")
    button.focus()
    page.keyboard.press("ArrowDown")
    highlighted = page.locator(".p-select-option--highlighted")
    highlighted.wait_for()
    for _ in range(20):
        if highlighted.inner_text().strip() == option:
            break
        page.keyboard.press("ArrowDown")
        page.wait_for_timeout(100)
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    assert button.inner_text() == option


def open_form(system, page, name="rlhf"):
    deployment = system.get(f"/deployments/name/rlhf-pipeline/{name}")["id"]
    page.goto(f"{system.url}/deployments/deployment/{deployment}/run")
    last = field(page, "until (Optional)").locator("button.p-select-button__control")
    # The form fills itself with defaults.
    until(lambda: last.count() and last.inner_text() == "publish", 60, "the form's default")
    page.wait_for_timeout(1500)


def write(page, label, text):
    field(page, f"{label} (Optional)").locator("textarea").fill(text)


def runs(system):
    body = {"flows": {"name": {"any_": ["rlhf-pipeline"]}}, "sort": "EXPECTED_START_TIME_DESC"}
    return system.post("/flow_runs/filter", body)


def test_form_is_short_and_the_whole_one_refuses_a_wrong_value_with_its_name(system, page):
    height = "Math.max(...[...document.querySelectorAll('*')].map(e => e.scrollHeight))"
    open_form(system, page)
    assert page.evaluate(height) < 1600
    before = len(runs(system))
    open_form(system, page, "rlhf-all-settings")
    assert page.evaluate(height) > 20_000
    field(page, "Seed (Optional)").locator("input").fill("-4")
    page.get_by_role("button", name="Submit").click()
    page.get_by_text(
        re.compile("less than the minimum|greater than or equal|minimum")
    ).first.wait_for()
    assert "/run" in page.url
    assert len(runs(system)) == before


def test_wrong_setting_in_the_box_ends_the_run_at_once_and_is_named(system, page):
    open_form(system, page)
    choose(page, "preset", "smoke")
    write(page, "name", "wrong one")
    write(page, "settings", "ppo:\n  kl_coeff: 0.1\n")
    page.get_by_role("button", name="Submit").click()
    run = until(lambda: next((r for r in runs(system) if r["name"] == "wrong-one"), None), 90)
    found = system.wait(run["id"], "FAILED")
    assert found["state_name"] == "ConfigurationError"
    assert "ppo.kl_coeff is not a setting; did you mean ppo.kl_coef?" in found["state"]["message"]
    assert system.tasks(run["id"]) == {}


def test_wrong_value_is_refused_by_the_api_with_its_path(system):
    deployment = system.get("/deployments/name/rlhf-pipeline/rlhf-all-settings")["id"]
    answer = system.api.post(
        f"/deployments/{deployment}/create_flow_run",
        json={"parameters": {"config": {"ppo": {"clip_range": 7}}}},
    )
    assert answer.status_code in (409, 422)
    assert "clip_range" in answer.text


def test_smoke_run_from_the_form_to_the_report(system, page):
    """Real ranks on real data."""
    system.for_real()
    open_form(system, page)
    choose(page, "preset", "smoke")
    write(page, "name", "from the form")
    page.get_by_role("button", name="Submit").click()
    run = until(lambda: next((r for r in runs(system) if r["name"] == "from-the-form"), None), 90)
    run = run["id"]
    page.goto(f"{system.url}/runs/flow-run/{run}")
    page.get_by_text("Running").first.wait_for(timeout=60_000)
    system.wait(run, "COMPLETED", seconds=280)
    page.get_by_text("Completed").first.wait_for(timeout=30_000)
    names = {name: t["state_name"] for name, t in system.tasks(run).items()}
    assert {"model", "data", "sft", "label", "reward", "ppo", "evaluate", "publish"} <= set(names)

    page.get_by_text("Artifacts", exact=True).first.click()
    page.get_by_text("report", exact=True).first.click()
    page.get_by_text("Replies before and after").first.wait_for()
    curves = page.locator("img[src^='data:image/png']").first
    assert curves.evaluate("image => image.complete && image.naturalWidth > 300")
    drawn = page.locator("img[src^='data:image/svg+xml']").first
    assert drawn.evaluate("image => image.complete && image.naturalWidth > 300"), "the lineage"


def test_retry_is_clicked_and_only_what_failed_runs(system, page):
    system.plan(ppo=["data"])
    run = system.submit("seed=201")
    system.wait(run, "FAILED")
    before = {c["id"]: c["end_time"] for c in system.children(run)}
    system.plan()
    page.goto(f"{system.url}/runs/flow-run/{run}")
    page.get_by_role("button", name="Retry").first.click()
    dialog = page.get_by_role("dialog")
    if dialog.count():
        dialog.get_by_role("button", name="Retry").click()
    else:
        page.get_by_role("button", name="Retry").last.click()
    until(lambda: system.run(run)["run_count"] == 2, 60, "the second attempt")
    system.wait(run, "COMPLETED")
    after = {c["id"]: c["end_time"] for c in system.children(run)}
    assert before.items() <= after.items()
    tasks = system.tasks(run)
    assert {tasks[s]["state_name"] for s in ("model", "data", "sft", "label", "reward")} == {
        "Cached"
    }
