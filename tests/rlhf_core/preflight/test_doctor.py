from __future__ import annotations

import http.server
import threading
from importlib import metadata
from pathlib import Path

import pytest

from rlhf_core.errors import ModelError
from rlhf_core.preflight.doctor import compare_pins, examine, main, report
from rlhf_core.preflight.memory import GIB
from rlhf_core.system.machine import Machine
from tests.rlhf_core.tiny_models import copy_of


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RLHF_STORE", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


def test_report_shows_machine_and_memory() -> None:
    text = report()
    assert "134,515,008 parameters" in text
    for word in ("python", "torch", "GPUs", "store", "Prefect", "ddp", "zero2", "PPO"):
        assert word in text


def test_report_of_a_folder(tmp_path: Path) -> None:
    assert "233,920 parameters" in report(str(copy_of("llama", tmp_path / "model")))


def test_gpus_bring_their_strategies_and_verdicts() -> None:
    found = examine(machine=Machine(gpus=2, gpu_memory=6 * GIB, cores=8, ram=64 * GIB))
    assert set(found.memory["SFT"]) == {"ddp", "zero1", "zero2", "zero2_cpu", "fsdp2"}
    assert found.available == 6 * GIB
    assert found.ranks == 2
    # a CPU build of torch beside GPUs is worth a word
    torch = next(f for f in found.findings if f.subject == "torch")
    assert (torch.state == "bad") == metadata.version("torch").endswith("+cpu")


def test_model_that_is_not_here() -> None:
    with pytest.raises(ModelError, match="is not on this machine"):
        report("no-such-owner/no-such-model")
    with pytest.raises(ModelError, match="valid are llama"):
        report("random:t5")


def test_missing_and_differing_packages_are_named() -> None:
    version = metadata.version("pydantic")
    missing, differing = compare_pins(
        f"# comment\npydantic=={version}\nno-such-package==1.0 \\\n    --hash=sha256:00\n"
        "psutil==0.1  # why\n"
    )
    assert missing == ["no-such-package==1.0"]
    assert len(differing) == 1
    assert differing[0].startswith("psutil ")


def test_exit_code_follows_what_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import rlhf_core.preflight.doctor as doctor

    monkeypatch.setattr(doctor, "requirements_folder", lambda: None)
    assert main() == 0
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("RLHF_STORE", f"file://{tmp_path}/blocked/store")
    assert main() == 1
    assert "BAD" in capsys.readouterr().out


def test_prefect_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{server.server_port}/api")
        good = next(f for f in examine().findings if f.subject == "Prefect")
        server.shutdown()
    assert good.state == "ok"
    bad = next(f for f in examine().findings if f.subject == "Prefect")
    assert bad.state == "bad"
    assert "unset PREFECT_API_URL" in bad.text
