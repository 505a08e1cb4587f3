"""The page to compare models, in a real Chromium: no Prefect server is needed for it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.fingerprint import fingerprint
from rlhf_core.jobs import DataJob, DataSettings
from rlhf_core.runtime.context import StageContext
from rlhf_core.stages.prepare_data import run as prepare
from rlhf_core.store import open_store
from rlhf_core.system.ports import free_ports
from tests.rlhf_core.playground.tiny_run import tiny_run
from tests.system.conftest import ROOT, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PASSWORD = "a-password-for-tests"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.system,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


class Playground:
    """`rlhf playground` on a store of its own."""

    def __init__(self, folder, *arguments, password=None):
        self.run = tiny_run(open_store(str(folder / "store")))
        self.store = self.run.store
        self.port = free_ports(1)[0]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RLHF_"))}
        clean |= {"RLHF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
        clean |= {"RLHF_PLAYGROUND_PASSWORD": password} if password else {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli.main", "playground", "--port", str(self.port),
             "--store", str(folder / "store"), *arguments],
            cwd=folder, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.url = f"http://127.0.0.1:{self.port}"
        until(self._answers, 180, "the page")

    def _answers(self):
        assert self.process.poll() is None, self.process.communicate()[0]
        try:
            return httpx.get(self.url).status_code in (200, 401)
        except httpx.HTTPError:
            return False

    def end(self, number=signal.SIGTERM):
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, output
        assert "Traceback" not in output, output
        assert [child for child in children if child.is_running()] == []


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    pytest.importorskip("gradio")
    found = Playground(tmp_path_factory.mktemp("playground"))
    yield found
    found.end()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield found
        found.close()


@pytest.fixture
def visit(browser, playground, tmp_path):
    """Opens the page; at the end, it has asked no other machine for anything."""
    opened = []

    def open_page(locale="en-US", blind=False):
        page = browser.new_context(
            locale=locale, viewport={"width": 1400, "height": 1050}
        ).new_page()
        page.set_default_timeout(60_000)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        opened.append((page, asked))
        page.goto(playground.url)
        page.locator("#name-1").get_by_text(re.compile("Model B|模型 B")).wait_for()
        if not blind:
            page.get_by_text(re.compile("^(Settings|设置)$")).click()
            page.locator("#blind input").uncheck()
            page.locator("#name-1").get_by_text("PPO").wait_for()
        return page

    yield open_page
    for number, (page, asked) in enumerate(opened):
        page.screenshot(path=tmp_path / f"last-{number}.png")
        page.context.close()
        elsewhere = [u for u in asked if not u.startswith((playground.url, "data:", "blob:"))]
        assert elsewhere == []


def ask(page, text, columns=2):
    page.locator("#message textarea").fill(text)
    page.locator("#ask").click()
    for i in range(columns):
        page.locator(f"#chat-{i} .message", has_text=re.compile("Reward|奖励分")).last.wait_for()
    until(lambda: page.locator("#message textarea").input_value() == "", 20, "an empty message")


def shorten(page, tokens=16):
    if not page.locator("#length").is_visible():
        page.get_by_text(re.compile("^(Settings|设置)$")).click()
    number, slider = (page.locator(f"#length input[type={kind}]") for kind in ("number", "range"))
    for _ in range(20):  # the page may still be putting its texts, and with them values, in place
        number.fill(str(tokens))
        number.press("Tab")
        page.wait_for_timeout(300)
        if number.input_value() == slider.input_value() == str(tokens):
            return
    raise AssertionError(f"the slider stays at {slider.input_value()}")


def votes(playground):
    return [playground.store.read_record(p) for p in playground.store.list_records("votes/")]


def test_two_models_are_asked_scored_and_voted_on(playground, visit, tmp_path, monkeypatch):
    page = visit()
    shorten(page)
    ask(page, "How are you?")
    shown = [page.locator(f"#chat-{i}").inner_text() for i in (0, 1)]
    assert all("How are you?" in text for text in shown)
    scores = [re.search(r"Reward ([+-]\d+\.\d{3})", text)[1] for text in shown]
    assert page.locator("#vote-0").inner_text() == "← Left is better"
    page.locator("#vote-1").click()
    page.locator("#status", has_text="PPO was better").wait_for()
    assert page.locator("#vote-0").is_disabled() and page.locator("#vote-1").is_disabled()

    [vote] = votes(playground)
    assert vote["prompt"] == [{"role": "user", "content": "How are you?"}]
    assert vote["models"]["chosen"]["digest"] == playground.run.stages["ppo"]
    assert vote["models"]["rejected"]["digest"] == playground.run.stages["sft"]
    assert f"{vote['models']['chosen']['score']:+.3f}" == scores[1]
    assert vote["sampling"]["max_new_tokens"] == 16
    first = " ".join(vote["rejected"].split()[:1])
    assert first in shown[0]

    ask(page, "And tomorrow?")  # both go on from the better reply
    page.locator("#vote-0").click()
    page.locator("#status", has_text="SFT was better").wait_for()
    newest = votes(playground)[-1]
    said = [m["content"] for m in newest["prompt"]]
    assert said == ["How are you?", vote["chosen"], "And tomorrow?"]

    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    settings = {"source": "playground-votes", "max_length": 2048, "heldout_fraction": 0.0}
    job = DataJob(
        purpose="preference", model=playground.run.stages["model"], **settings,
        fingerprint=fingerprint(DataSettings(**settings), playground.store),
    )  # fmt: skip
    context = StageContext(store=playground.store, key=job.key(), folder=tmp_path / "job")
    rows = Rows(playground.store.fetch(prepare(job, context).digest), "train", "preference")
    found = {(r["chosen"], r["rejected"]) for r in rows.take(list(range(len(rows))))}
    assert found == {(v["chosen"], v["rejected"]) for v in (vote, newest)}


def test_blind_vote_shows_names_and_scores_only_afterwards(playground, visit):
    page = visit(blind=True)
    shorten(page)
    before = len(votes(playground))
    for turn, (button, said) in enumerate(
        (("#vote-0", "was better"), ("#tie", "equally good"), ("#both_bad", "both are bad"))
    ):
        page.locator("#message textarea").fill(f"Question {turn}")
        page.locator("#ask").click()
        page.locator(f"{button}:not([disabled])").wait_for()
        names = [page.locator(f"#name-{i}").inner_text() for i in (0, 1)]
        assert names == ["Model A", "Model B"]
        newest = [page.locator(f"#chat-{i} .bot").last.inner_text() for i in (0, 1)]
        assert not any("Reward" in text for text in newest)
        page.locator(button).click()
        page.locator("#status", has_text=said).wait_for()
        names = {page.locator(f"#name-{i}").inner_text() for i in (0, 1)}
        assert names == {"SFT", "PPO"}
        for i in (0, 1):
            page.locator(f"#chat-{i} .bot", has_text="Reward").last.wait_for()
        if turn == 0:
            page.locator("#agreement", has_text="prefers the reply").wait_for()
        assert page.locator(button).is_disabled()

    better, tie, bad = votes(playground)[before:]
    assert [r["blind"] for r in (better, tie, bad)] == [True] * 3
    assert (tie["verdict"], bad["verdict"]) == ("tie", "both_bad")
    assert {m["name"] for m in tie["models"]} == {"SFT", "PPO"} and len(tie["replies"]) == 2
    assert better["reward_models"] == [playground.run.stages["reward"]]
    scores = [better["models"][side]["score"] for side in ("chosen", "rejected")]
    assert None not in scores


HOSTILE = """<img src="http://127.0.0.1:9/spy.png" onerror="document.title='pwned'">
![spy](http://127.0.0.1:9/spy2.png) <form action="http://127.0.0.1:9/"><input name="password">
<button>Log in again</button></form> <div style="position:fixed;inset:0;background:red">gone</div>
<script>document.title = 'pwned'</script> $$x^2$$ [link](javascript:alert(1))"""


def test_what_a_model_says_is_text(playground, visit, browser):
    """The user's message goes the way of a reply, and needs no model that says such a thing."""
    page = visit()
    shorten(page)
    ask(page, HOSTILE)
    for i in (0, 1):
        bubble = page.locator(f"#chat-{i} .user").last
        assert " ".join(HOSTILE.split()) in " ".join(bubble.inner_text().split())
        for tag in ("img", "form", "input", "script", "a", "math", "div[style*=fixed]"):
            assert bubble.locator(f".message-content {tag}").count() == 0, tag
    assert "pwned" not in page.title()

    # The second wall, should Gradio ever show one as HTML.
    again = browser.new_page()
    again.goto(playground.url)
    loaded = again.evaluate("""() => new Promise(resolve => {
        const image = new Image()
        image.onload = () => resolve("loaded")
        document.addEventListener("securitypolicyviolation", e => resolve(e.violatedDirective))
        image.src = "http://127.0.0.1:9/spy3.png"
    })""")
    again.close()
    assert loaded == "img-src"


def test_nothing_can_be_uploaded(playground):
    files = {"files": ("x.txt", b"hello")}
    for path in ("/upload", "/gradio_api/upload", "/gradio_api/process_recording"):
        assert httpx.post(playground.url + path, files=files).status_code == 403
    assert httpx.get(f"{playground.url}/gradio_api/proxy=http://127.0.0.1:9/").status_code == 403


def test_page_under_another_name_is_refused(playground):
    """A name that was made to point to 127.0.0.1."""
    for path in ("/", "/config", "/gradio_api/info"):
        answer = httpx.get(playground.url + path, headers={"Host": "evil.example"})
        assert answer.status_code == 400 and "content-security-policy" in answer.headers


def thumbs(playground):
    return [playground.store.read_record(p) for p in playground.store.list_records("thumbs/")]


def test_single_replies_are_judged_beside_a_vote(playground, visit, tmp_path, monkeypatch):
    page = visit()
    shorten(page)
    assert page.locator("#up-0").is_disabled() and page.locator("#down-1").is_disabled()
    ask(page, "What is rain?")
    before = len(votes(playground))
    assert page.locator("#up-0").inner_text() == "👍 Good"
    page.locator("#up-1").click()
    page.locator("#status", has_text="a good reply of PPO").wait_for()
    assert page.locator("#up-1").is_disabled() and page.locator("#down-1").is_disabled()
    page.locator("#down-0").click()
    page.locator("#status", has_text="a bad reply of SFT. Rated replies in").wait_for()
    page.locator("#vote-1").click()
    page.locator("#status", has_text="PPO was better").wait_for()
    assert len(votes(playground)) == before + 1

    up, down = thumbs(playground)
    assert [(t["label"], t["model"]["name"]) for t in (up, down)] == [(True, "PPO"), (False, "SFT")]
    assert up["prompt"] == down["prompt"] == [{"role": "user", "content": "What is rain?"}]
    assert up["completion"].split()[0] in page.locator("#chat-1").inner_text()
    assert up["model"]["digest"] == playground.run.stages["ppo"]
    assert up["sampling"]["max_new_tokens"] == 16

    ask(page, "And snow?")  # both can be judged anew, and go on from the reply that was voted for
    page.locator("#down-1").click()
    page.locator("#status", has_text="in the store: 3").wait_for()
    said = [m["content"] for m in thumbs(playground)[-1]["prompt"]]
    assert said == ["What is rain?", up["completion"], "And snow?"]

    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    settings = {"source": "playground-thumbs", "max_length": 2048, "heldout_fraction": 0.0}
    job = DataJob(purpose="unpaired", model=playground.run.stages["model"], **settings)
    context = StageContext(store=playground.store, key=job.key(), folder=tmp_path / "job")
    rows = Rows(playground.store.fetch(prepare(job, context).digest), "train", "unpaired")
    found = {(row["completion"], row["label"]) for row in rows}
    assert found == {(t["completion"], t["label"]) for t in thumbs(playground)}


def test_page_speaks_chinese_to_a_chinese_browser_and_changes_when_asked(visit):
    page = visit("zh-CN")
    assert page.locator("h1").inner_text() == "模型对比"
    assert page.locator("#ask").inner_text() == "发送"
    shorten(page)
    ask(page, "你好吗？")
    assert "奖励分" in page.locator("#chat-0").inner_text()
    assert page.locator("#vote-0").inner_text() == "← 左边更好"
    assert page.locator("#down-1").inner_text() == "👎 不好"
    page.locator("#down-1").click()
    page.locator("#status", has_text="已保存：PPO 的回答不好").wait_for()
    page.get_by_text("English", exact=True).click()
    page.locator("h1", has_text="Compare models").wait_for()
    assert page.locator("#vote-1").inner_text() == "Right is better →"


def test_other_models_are_picked_and_a_damaged_one_is_a_message(playground, visit):
    page = visit()
    field = page.locator("#models input")
    field.click()
    page.get_by_role("option", name="base").click()
    page.locator("#name-2", has_text="base").wait_for()
    assert page.locator("#vote-0").inner_text() == "↑ This one is best"
    shorten(page)

    entry = playground.store.get(playground.run.stages["model"]).file("model.safetensors")
    blobs = Path(playground.store.url.removeprefix("file://")) / "blobs/sha256"
    path = blobs / entry.sha256[:2] / entry.sha256
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole[: len(whole) // 2])  # half written
    ask(page, "How are you?")
    error = page.locator("#chat-2", has_text="This model cannot reply")
    error.wait_for()
    assert "model.safetensors" in error.inner_text()
    page.locator("#vote-0:not([disabled])").wait_for()
    assert page.locator("#vote-2").is_disabled()
    path.write_bytes(whole)
    page.locator("#new").click()
    until(lambda: page.locator("#chat-2").inner_text().strip() == "", 20, "an empty page")
    ask(page, "How are you?", columns=3)


def test_long_reply_is_stopped(visit):
    page = visit()
    shorten(page, 2048)
    page.locator("#message textarea").fill("Tell me everything.")
    began = time.monotonic()
    page.locator("#ask").click()
    page.locator("#chat-0 .bot").last.wait_for()
    page.wait_for_timeout(1000)
    page.locator("#stop").click()
    for i in (0, 1):
        page.locator(f"#chat-{i} .message", has_text="Reward").last.wait_for()
    assert time.monotonic() - began < 60


def test_password_is_asked_for_where_others_can_come(browser, tmp_path):
    pytest.importorskip("gradio")
    found = Playground(tmp_path, "--host", "0.0.0.0", password=PASSWORD)
    try:
        assert PASSWORD not in " ".join(psutil.Process(found.process.pid).cmdline())
        assert httpx.get(f"{found.url}/config").status_code == 401
        wrong = {"username": "me", "password": "guess"}
        with ThreadPoolExecutor(12) as guessing:
            guesses = [
                guessing.submit(httpx.post, f"{found.url}/login", data=wrong, timeout=100)
                for _ in range(12)
            ]
            began = time.monotonic()
            assert httpx.get(f"{found.url}/config").status_code == 401
            assert time.monotonic() - began < 5
            assert {guess.result().status_code for guess in guesses} == {400}
        page = browser.new_context().new_page()
        page.set_default_timeout(60_000)
        page.goto(found.url)
        page.get_by_label("username").fill("ada")
        page.get_by_label("password").fill(PASSWORD)
        page.get_by_role("button", name="Login").click()
        page.locator("#name-1").get_by_text("Model B").wait_for()
        page.context.close()
    finally:
        found.end(signal.SIGINT)
