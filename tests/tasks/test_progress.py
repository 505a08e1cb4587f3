"""Progress of a stage: its own lines, those of another process, and what ranks use."""

import logging
import subprocess
import sys

import psutil

from tasks import progress
from tasks.events import parse_progress
from tasks.launchers.failures import STATE_NAMES, category_of, state_name
from tasks.launchers.usage import table


def shown(caplog):
    return [r.rlhf["text"] for r in caplog.records if r.rlhf["kind"] == "progress"]


def test_progress_of_another_process_comes_through_unchanged(caplog, monkeypatch):
    monkeypatch.setattr(progress.Progress, "_show", lambda *_: None)
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    child = progress.Progress("ppo", logging.getLogger("child"))
    child({"step": 1, "total": 4, "score": 0.5})
    child({"step": 2, "total": 4, "score": 0.75})
    logged = [r.getMessage() for r in caplog.records]
    texts = shown(caplog)
    assert texts[0] == "step 1/4  score 0.5"
    assert texts[1].startswith("step 2/4  score 0.75  ")
    assert texts[1].endswith(" left")
    caplog.clear()
    parent = progress.Progress("ppo", logging.getLogger("parent"))
    for message in logged:
        parent(parse_progress(message))
    assert shown(caplog) == texts


def test_other_messages_are_no_progress():
    for message in ("step by step", "sft: done in 3 s", "heldout_loss 3.2", "step 1/x  loss 2"):
        assert parse_progress(message) is None


def test_page_shows_numbers_curves_and_use():
    stage = progress.Progress("sft", logging.getLogger("test"))
    stage._lines = [{"step": i, "total": 9, "loss": 1 / i} for i in range(1, 5)]
    stage({"usage": "| rank |"})
    reply = {"prompt": "Say <b>", "reply": "a | b", "score": 0.5}
    stage({"step": 4, "samples": [reply]})
    page = stage.page("step 4/9  loss 0.25")
    assert page.startswith(
        "**sft**: step 4/9  loss 0.25\n\n![curves so far](data:image/png;base64,"
    )
    assert "\n\nReplies of step 4\n\n| prompt | reply | score |" in page
    assert "\n| Say &lt;b&gt; | a \\| b | 0.5 |\n" in page
    assert page.endswith("\n\n| rank |")


def test_use_of_ranks_is_a_table():
    code = (
        "from rlhf_core.system.processes import name_process; name_process('rlhf rank 1'); "
        "import time; x = bytearray(200 * 2**20); print(1, flush=True); time.sleep(60)"
    )
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        rank.stdout.readline()
        [line] = table([psutil.Process(rank.pid), psutil.Process()]).splitlines()[2:]
        number, memory, load, _ = (cell.strip() for cell in line.strip("|").split("|"))
        assert (number, load[-1]) == ("1", "%")
        assert 0.18 < float(memory.removesuffix(" GiB")) < 0.3
    finally:
        rank.kill()
        rank.wait()
    assert table([psutil.Process()]) == ""


def test_every_category_has_a_state_of_its_own():
    assert len(set(STATE_NAMES.values())) == len(STATE_NAMES)
    assert all(category_of(state_name(category)) == category for category in STATE_NAMES)
    assert category_of("Crashed") == "internal"
