from __future__ import annotations

import http.server
import io
import threading
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_core.errors import ConfigError, ModelError
from rlhf_core.jobs import LoRA, PPOSettings, Resources, RewardSettings, SFTSettings
from rlhf_core.preflight.doctor import Question, compare_pins, examine, main, report
from rlhf_core.preflight.doctor_page import show
from rlhf_core.preflight.fitting import Fit, llama_like
from rlhf_core.preflight.memory import GIB, estimate
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
    for word in ("python", "torch", "GPUs", "store", "Prefect", "ddp", "fsdp2", "QLoRA", "PPO"):
        assert word in text


def test_report_of_a_folder(tmp_path: Path) -> None:
    assert "233,920 parameters" in report(Question(str(copy_of("llama", tmp_path / "model"))))


def test_gpus_bring_their_strategies_and_verdicts() -> None:
    found = examine(machine=Machine(gpus=2, gpu_memory=6 * GIB, cores=8, ram=64 * GIB))
    of_weights = {fit.strategy for fit in found.fits["SFT"] if fit.tuning == "all weights"}
    assert of_weights == {"ddp", "zero1", "zero2", "zero2_cpu", "fsdp2"}
    assert found.available == 6 * GIB
    assert found.ranks == 2
    # a CPU build of torch beside GPUs is worth a word
    torch = next(f for f in found.findings if f.subject == "torch")
    assert (torch.state == "bad") == metadata.version("torch").endswith("+cpu")


@pytest.mark.parametrize("stage", ["SFT", "reward", "PPO"])
def test_shown_micro_batches_are_the_largest_that_fit(stage: str) -> None:
    question = Question(parameters="7B", gpus=8, gpu_memory=80, length=2048)
    found = examine(question)
    config = llama_like(7_000_000_000)
    kinds = {"SFT": SFTSettings, "reward": RewardSettings, "PPO": PPOSettings}
    for fit in found.fits[stage]:
        lora = None if fit.tuning == "all weights" else LoRA(rank=16)

        def need(rows: int, fit: Fit = fit, lora: LoRA | None = lora) -> int:
            place = Resources(
                ranks=8, strategy=fit.strategy, micro_batch_size=rows,  # type: ignore[arg-type]
                gradient_checkpointing=fit.checkpointing,
            )  # fmt: skip
            quantization = "nf4" if fit.tuning == "QLoRA" else None
            return estimate(
                config, kinds[stage](lora=lora), place, stage.lower(), max_length=2048,
                quantization=quantization,
            ).total  # fmt: skip

        assert fit.need.total == need(max(1, fit.rows))
        assert (fit.need.total <= 80 * GIB) == (fit.rows > 0)
        if fit.rows:
            assert fit.rows == 64 or need(2 * fit.rows) > 80 * GIB


def test_question_about_other_gpus_leaves_this_machine_out() -> None:
    text = report(Question(parameters="7B", gpus=8, gpu_memory=80, length=2048))
    assert "on 8 GPUs of 80 GiB: bf16, sequences of 2,048 tokens" in " ".join(text.split())
    assert "python" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    ddp = next(line for line in text.splitlines() if line.split()[:2] == ["all", "ddp"])
    assert all(cell.startswith("(") for cell in ddp.split()[2:])  # 16 bytes a parameter: no way


def test_table_of_gpus_fits_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    show(examine(Question(parameters="70B", gpus=8, gpu_memory=80)), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text


@pytest.mark.parametrize("size", ["135M", "1.1B", "7B", "70B"])
def test_llama_of_a_size_has_about_that_many_parameters(size: str) -> None:
    count = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
    assert examine(Question(parameters=size)).parameters == pytest.approx(count, rel=0.03)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question(parameters="seven"), "expected a number of millions or billions"),
        (Question(parameters="0B"), "expected a number of millions or billions"),
        (Question(model="random:llama", parameters="7B"), "give one"),
        (Question(gpus=8), "--gpu-memory too, in GiB"),
    ],
)
def test_questions_that_make_no_sense(question: Question, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        examine(question, Machine(cores=2, ram=8 * GIB))


def test_model_that_is_not_here() -> None:
    with pytest.raises(ModelError, match=r"is not on this machine.*--parameters 7B"):
        report(Question("no-such-owner/no-such-model"))
    with pytest.raises(ModelError, match="valid are llama"):
        report(Question("random:t5"))


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
    assert main(Question()) == 0
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("RLHF_STORE", f"file://{tmp_path}/blocked/store")
    assert main(Question()) == 1
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
