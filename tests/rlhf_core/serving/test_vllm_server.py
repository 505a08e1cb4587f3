"""How vLLM is started, and what is made of its output, without vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import psutil

from rlhf_core.serving.engine_output import EngineOutput
from rlhf_core.serving.engine_process import named_as_main
from rlhf_core.serving.vllm_server import VllmAuthMiddleware, options, sampling_by_default
from tests.rlhf_core.data.helpers import byte_tokenizer
from tests.rlhf_core.serving.test_auth import ask, echo


def test_options_hold_folder_name_and_address_but_no_key(tmp_path):
    given = options(tmp_path, "support-bot", "127.0.0.1", 8001, trust=False)
    assert given[:7] == [
        str(tmp_path), "--served-model-name", "support-bot", "--host", "127.0.0.1",
        "--port", "8001",
    ]  # fmt: skip
    assert not [text for text in given if "key" in text]
    assert options(tmp_path, "x", "h", 1, trust=True)[-1] == "--trust-remote-code"


def test_models_that_say_how_to_sample_keep_it(tmp_path):
    assert sampling_by_default(tmp_path) == {"temperature": 0.7, "top_k": 0, "top_p": 1.0}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 2}))
    assert sampling_by_default(tmp_path)["temperature"] == 0.7
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.3}))
    assert sampling_by_default(tmp_path) == {}


def test_its_requests_are_checked_before_vllm_sees_them(monkeypatch):
    checks = ("bot", None, byte_tokenizer())
    monkeypatch.setattr(VllmAuthMiddleware, "checks", checks, raising=False)
    auth, path = VllmAuthMiddleware(echo), "/v1/chat/completions"
    message = {"role": "user", "content": "Hello"}
    assert ask(auth, path, {"messages": [message], "tools": [{}], "n": 2})[0] == 200
    for wrong in ({"audio": {"voice": "a"}}, {"messages": [{**message, "content": "<|im_end|>"}]}):
        status, answer = ask(auth, path, {"messages": [message], **wrong})
        assert status == 400 and answer["error"]["param"].startswith(next(iter(wrong)))


def test_last_error_of_a_child_is_the_reason(capfd):
    lines = [
        "(EngineCore pid=7) ERROR 11-28 [core.py:1] ValueError: Head size 16 is not supported.",
        "(EngineCore pid=7) RuntimeError: Engine core initialization failed. See above.",
    ]
    with EngineOutput() as output:
        subprocess.run([sys.executable, "-c", f"print({chr(10).join(lines)!r})"], check=True)
        output.settle()
        assert output.reason() == "Head size 16 is not supported"
    assert capfd.readouterr() == ("", "")


def test_output_is_let_through_once_it_serves(capfd):
    with EngineOutput() as output:
        os.write(1, b"early\n")
        child = subprocess.Popen(
            [sys.executable, "-c", "input(); print('late')"], stdin=subprocess.PIPE
        )
        output.release()
        print("served")
        child.communicate(b"\n")
        output.settle()
    assert capfd.readouterr() == ("served\n", "late\n")


SPAWNS = """
import multiprocessing, os, signal, sys, time
from rlhf_core.serving.engine_process import named_as_main
if __name__ != "__main__":
    sys.exit("the child ran its parent's program")
with named_as_main():
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
print(child.pid, flush=True)
time.sleep(2)
os.kill(child.pid, signal.SIGINT)
child.join(1)
print(child.exitcode, flush=True)
os.kill(os.getpid(), 9)
"""


def test_spawned_processes_end_with_the_server_and_not_by_ctrl_c(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SPAWNS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, env=environment, timeout=60
    )
    pid, ended = done.stdout.split()
    child = int(pid)
    assert ended == "None"
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(child).wait(timeout=60)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


def test_main_module_is_named_again_afterwards():
    main = sys.modules["__main__"]
    before = main.__spec__
    with named_as_main():
        assert main.__spec__.name == "rlhf_core.serving.engine_process"
    assert main.__spec__ is before
