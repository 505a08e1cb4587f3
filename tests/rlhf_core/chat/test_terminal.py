from __future__ import annotations

import os
import pty
import select
import time
from pathlib import Path

import pytest

from rlhf_core.errors import ConfigError, DataError, ModelError
from tests import forked
from tests.forked import ROOT
from tests.rlhf_core.tiny_models import copy_of

PROGRAM = (
    "import sys; from pathlib import Path; from rlhf_core.chat.terminal import main; "
    "sys.exit(main(Path(sys.argv[1]), max_new_tokens=int(sys.argv[2])))"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return copy_of("llama", tmp_path / "model")


def chat_with(model: Path) -> Chat:  # type: ignore[name-defined]  # noqa: F821
    from rlhf_core.chat.terminal import Chat

    return Chat(model, None, 8, 1.0, 0)


def test_once_prints_the_reply_and_nothing_else(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlhf_core.chat.terminal import main

    assert main(model, once="Hello", max_new_tokens=8) == 0
    first = capsys.readouterr()
    assert first.out.strip()
    assert first.err == ""
    assert main(model, once="Hello", max_new_tokens=8) == 0
    assert capsys.readouterr().out == first.out
    assert main(model, once="Hello", max_new_tokens=8, temperature=0, seed=5) == 0
    greedy = capsys.readouterr().out
    assert main(model, once="Hello", max_new_tokens=8, temperature=0, seed=6) == 0
    assert capsys.readouterr().out == greedy != first.out


def test_history_and_system_reach_the_prompt(model: Path) -> None:
    chat = chat_with(model)
    chat.answer("First")
    chat.system = "Be short"
    chat.history.append({"role": "user", "content": "Second"})
    text = chat.tokenizer.decode(chat._prompt())
    parts = ["<|im_start|>system\nBe short<|im_end|>", "First<|im_end|>", "Second<|im_end|>"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert text.endswith("<|im_start|>assistant\n")
    chat.reset()
    assert chat.history == []


def test_oldest_turns_leave_a_full_context(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = chat_with(model)
    chat.chat_model.context = 90
    for text in ("One", "Two", "Three", "Four", "Five", "Six", "Seven"):
        chat.answer(text)
    assert "no longer fit the context of 90 tokens" in capsys.readouterr().err
    assert chat.history[0]["role"] == "user"
    assert chat.history[0]["content"] != "One"
    assert len(chat._prompt()) <= 90
    before = list(chat.history)
    with pytest.raises(DataError, match="shorten the message"):
        chat.answer("far too long " * 60)
    assert len(chat.history) < len(before) + 1


@pytest.mark.slow
def test_piped_lines_are_a_conversation(model: Path) -> None:
    lines = "Hello\n\n/system Be nice\nAgain\n/help\n/nonsense\n/reset\n/quit\nnever read\n"
    piped = model.parent / "lines"
    piped.write_text(lines)
    done = forked.run(
        "-c", PROGRAM, str(model), "8", cwd=ROOT, env=os.environ, needs=forked.MODELS, stdin=piped
    )
    assert done.returncode == 0
    assert done.stdout.strip()
    for text in (
        "System message set",
        "/reset ",
        "no command /nonsense",
        "Started a new conversation",
    ):
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert ">" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_stops_the_reply_but_not_the_program(model: Path) -> None:
    leader, follower = pty.openpty()
    terminal = Path(os.ttyname(follower))  # its own, so that ^C reaches it as a signal
    program = forked.start(
        "-c", PROGRAM, str(model), "1000", cwd=ROOT, env=os.environ, needs=forked.MODELS,
        stdin=terminal, output=terminal,
    )  # fmt: skip
    try:
        _read_until(leader, "> ")
        os.write(leader, b"Hello\n")
        _read_until(leader, "\n")  # the echo
        _read_until(leader, " ")  # the reply has begun
        os.write(leader, b"\x03")
        _read_until(leader, "(stopped)")
        _read_until(leader, "> ")
        _read_until(leader, "/quit or Ctrl-D ends", press=b"\x03")
        os.write(leader, b"/quit\n")
        assert program.wait(timeout=20) == 0
    finally:
        program.kill()
        os.close(leader)
        os.close(follower)


def _read_until(terminal: int, text: str, seconds: float = 180, press: bytes = b"") -> str:
    """Args:
    press: a key to press, and again every few seconds: a signal that comes between a prompt and
        Python's waiting for a line is only seen with the next one.
    """
    seen = ""
    deadline = time.monotonic() + seconds
    while text not in seen:
        os.write(terminal, press)
        patience = min(5.0 if press else seconds, deadline - time.monotonic())
        while text not in seen and select.select([terminal], [], [], max(0.0, patience))[0]:
            seen += os.read(terminal, 1).decode(errors="replace")
        assert text in seen or time.monotonic() < deadline, f"{text!r} did not come; got {seen!r}"
    return seen


def test_folders_that_cannot_talk(model: Path, tmp_path: Path) -> None:
    from rlhf_core.chat.terminal import main

    with pytest.raises(ModelError, match="There is no folder"):
        main(tmp_path / "nowhere", once="Hi")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        main(tmp_path / "empty", once="Hi")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        main(model, once="Hi")
    (model / "reward_head.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a reward model"):
        main(model, once="Hi")


def test_settings_out_of_range(model: Path) -> None:
    from rlhf_core.chat.terminal import main

    with pytest.raises(ConfigError, match="temperature is -1"):
        main(model, once="Hi", temperature=-1)
