"""The command's messages, exit codes and lists; without a Prefect server."""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import listing
from flows.cli.main import app
from flows.cli.playground import catalogue
from rlhf_core.jobs import PPOSettings
from rlhf_core.pipeline.preset_files import preset_names
from rlhf_core.pipeline.presets import build_config
from rlhf_core.store import open_store, registry
from rlhf_core.system.printable import CONTROLS


def fails(rlhf, *arguments, code=1):
    done = rlhf(*arguments, code=code)
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "--preset", "smok"], "There is no preset 'smok'. Did you mean smoke?"),
        (["run", "--preset", "smoke", "--set", "ppo.kl_coeff=1"], "did you mean ppo.kl_coef?"),
        (["run", "--preset", "smoke", "--set", "ppo.clip_range=2"], "expected less than 1"),
        (["run", "--set", "x"], "expected key=value"),
        (["run", "--config", "none.yaml"], "There is no file none.yaml."),
        (["run", "--preset", "smoke", "--store", "ftp://x"], "scheme 'ftp' is not supported"),
        (["run", "--preset", "smoke", "--store", "~nobody-here/x"], "Give the whole path"),
        (["run", "--config", "."], ". is a folder; expected a YAML file"),
        (["run", "--config", "x" * 300], "File name too long"),
        (["run", "--set", "name=a b"], "name: found 'a b', expected a text like '^"),
        (["job", "."], "Is a directory"),
        (["stage", "sfd", "--preset", "smoke"], "There is no stage 'sfd'. Did you mean sft?"),
        (["artifacts", "show", "zz"], "There is no artifact 'zz'"),
        (["artifacts", "show", "123456"], "123456"),
        (["artifacts", "pull", "ppo", "out"], "There is no artifact 'ppo'"),
        (["chat"], "No model is published"),
        (["chat", "nobody"], "There is no model 'nobody'"),
        (["models", "promote", "nobody", "1"], "There is no model 'nobody'"),
        (["job", "none.json"], "Cannot read the job file none.json"),
    ],
)
def test_wrong_argument_ends_with_one_message(rlhf, arguments, text):
    message = fails(rlhf, *arguments)
    assert text in message
    assert message.startswith(("Error: ", "\nError: "))


@pytest.mark.parametrize(
    "arguments",
    [["run", "--nope"], ["nope"], ["run", "--preset", "smoke", "--config", "x.yaml"], ["stage"]],
)
def test_wrong_usage_has_exit_code_2(rlhf, arguments):
    fails(rlhf, *arguments, code=2)


def test_doctor_fails_where_something_is_missing(rlhf):
    (rlhf.home / "blocked").write_text("")
    done = rlhf("doctor", code=1, env={"RLHF_STORE": f"file://{rlhf.home}/blocked/store"})
    assert "BAD" in done.stdout


def test_broken_yaml_is_named_with_its_line(rlhf):
    (rlhf.home / "broken run.yaml").write_text("sft:\n  epochs: [1\n")
    assert "broken run.yaml, line 3, column 1" in fails(rlhf, "run", "--config", "broken run.yaml")


def test_job_file_that_is_none_is_refused(rlhf):
    (rlhf.home / "x.json").write_text("{")
    assert "x.json is not a job file" in fails(rlhf, "job", "x.json")


def test_keys_in_a_store_url_are_not_shown(rlhf):
    url = "s3://marked-key:marked-secret@bucket/x"
    for arguments in (["--dry-run"], []):
        done = rlhf("run", "--preset", "smoke", "--store", url, *arguments, code=1)
        assert "an s3:// URL names the bucket first, without keys" in done.stderr
        assert "marked-secret" not in done.stdout + done.stderr


def test_settings_from_windows_are_read(rlhf):
    (rlhf.home / "x.yaml").write_bytes(b"\xef\xbb\xbfpreset: smoke\r\nppo:\r\n  steps: 7\r\n")
    assert "steps: 7" in rlhf("run", "--config", "x.yaml", "--dry-run", code=0).stdout


@pytest.mark.parametrize("content", [b"\x00\x01\xff", b"[" * 9999, b"seed: 2001-99-99", b"- 1"])
def test_file_that_holds_no_settings_is_one_message(rlhf, content):
    (rlhf.home / "x.yaml").write_bytes(content)
    message = fails(rlhf, "run", "--config", "x.yaml")
    assert message.startswith("Error: ") and "x.yaml" in message
    assert "not expected" not in message


def test_missing_data_is_found_by_a_dry_run(rlhf):
    message = fails(
        rlhf, "run", "--preset", "smoke", "--dry-run", "--set", "data.sft={source: none.jsonl}"
    )
    assert "none.jsonl" in message


def test_dry_run_shows_settings_and_starts_nothing(rlhf):
    done = rlhf("run", "--preset", "smoke", "--set", "ppo.steps=7", "--dry-run", code=0)
    assert "steps: 7" in done.stdout
    assert "nothing was started" in done.stdout
    shown = done.stdout.rpartition("\n\n")[0]
    found = yaml.safe_load(shown)
    assert found["ppo"]["clip_range"] == PPOSettings().clip_range and "dpo" not in found
    assert build_config(found) == build_config("smoke", ["ppo.steps=7"])
    marked = [line for line in shown.splitlines() if "# default: " in line]
    assert any(re.fullmatch(r"  steps: 7 +# default: \d+", line) for line in marked)
    assert not any("clip_range" in line for line in marked)
    assert not (rlhf.home / ".rlhf/runs").exists()


def test_old_name_of_a_setting_is_one_line_of_warning(rlhf):
    old = ("--set", "resources.stop_seconds=5", "--set", "ppo.resources.stop_seconds=6")
    done = rlhf("run", "--preset", "smoke", *old, "--dry-run", code=0)
    assert "stop_timeout: 5" in done.stdout and "stop_seconds" not in done.stdout
    [line] = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert line.startswith("Warning: the setting stop_seconds is now called stop_timeout;")


def test_presets_are_listed_with_a_sentence(rlhf):
    lines = rlhf("presets", code=0).stdout.splitlines()
    assert [line.split()[0] for line in lines] == preset_names()
    assert all(len(line.split()) > 4 and line.endswith(".") for line in lines)


def test_empty_store_says_so(rlhf):
    assert "No runs in file://" in rlhf("runs", code=0).stdout
    assert "No artifacts in file://" in rlhf("artifacts", "list", code=0).stdout


@pytest.fixture
def filled(rlhf):
    store = open_store(str(rlhf.home / ".rlhf/store"))
    artifact = store.publish_derived(
        kind="model", files={"config.json": b"{}"}, metadata={"algorithm": "sft"}
    )
    stages = {"sft": {"digest": artifact.digest, "kind": "model", "reused": True}}
    for name, state in (("a", "failed"), ("b", "running")):
        store.write_record(
            f"runs/{name}.json",
            {"id": name, "name": "demo", "state": state, "started": f"2026-01-01T0{name}",
             "stages": stages, "error": "no room\nFull log: x", "host": "elsewhere", "pid": 1},
        )  # fmt: skip
    return store, artifact


def test_runs_are_listed_newest_first(rlhf, filled):
    lines = rlhf("runs", code=0).stdout.splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["b", "demo", "-", "running"], ["a", "demo", "-", "failed"],
    ]  # fmt: skip
    assert lines[1].endswith("no room")
    records = [json.loads(line) for line in rlhf("runs", "--json", code=0).stdout.splitlines()]
    assert [record["id"] for record in records] == ["b", "a"]
    assert records[0]["error"] == "no room\nFull log: x"


def test_run_whose_process_is_gone_has_died(rlhf, filled):
    import socket

    record = filled[0].read_record("runs/b.json")
    filled[0].write_record("runs/b.json", {**record, "host": socket.gethostname(), "pid": 2**22})
    assert rlhf("runs", code=0).stdout.splitlines()[1].split()[3] == "died"


def test_artifacts_are_listed_shown_pulled_and_verified(rlhf, filled):
    ref = filled[1].ref
    assert ref in rlhf("artifacts", "list", "--kind", "model", code=0).stdout
    assert "config.json: 2" in rlhf("artifacts", "show", "sft", code=0).stdout
    rlhf("artifacts", "pull", ref, "out", code=0)
    assert json.loads((rlhf.home / "out/config.json").read_text()) == {}
    assert "1 of 1 intact." in rlhf("artifacts", "verify", code=0).stdout


def test_damage_is_found(rlhf, filled):
    blob = next((rlhf.home / ".rlhf/store/blobs").rglob("*" * 1 + filled[1].files[0].sha256))
    blob.chmod(0o644)
    blob.write_bytes(b"xx")
    done = rlhf("artifacts", "verify", code=1)
    assert "0 of 1 intact." in done.stdout
    assert "config.json" in done.stderr


def test_lineage_is_a_tree_that_names_shared_parents_once(rlhf):
    store = open_store(str(rlhf.home / ".rlhf/store"))

    def made(kind, algorithm, *parents, **metadata):
        return store.publish_derived(
            kind=kind, files={"f": f"{kind} {algorithm}".encode()},
            metadata={"algorithm": algorithm, **metadata}, parents=[p.digest for p in parents],
        )  # fmt: skip

    base = made("model", "import")
    data = made("dataset", "data", base)
    sft = made("model", "sft", base, data)
    ppo = made("model", "ppo", sft, data)
    store.delete(base.digest)
    lines = rlhf("artifacts", "tree", ppo.ref, code=0).stdout.splitlines()
    today = ppo.created[:10]
    assert lines == [
        f"{ppo.ref}  ppo  9 B  {today}",
        f"├── {sft.ref}  sft  9 B  {today}",
        f"│   ├── {base.digest[:12]}  (missing or damaged)",
        f"│   └── {data.ref}  data  12 B  {today}",
        f"│       └── {base.digest[:12]}  (missing or damaged)",
        f"└── {data.ref}  data  (see above)",
    ]


def test_gc_shows_first_and_deletes_what_no_version_and_no_run_needs(rlhf, filled):
    store, used = filled  # the newest run has not ended
    version = store.publish_derived(kind="published", files={"v": b"v"}, parents=[])
    store.write_record("models/chat/1.json", {"name": "chat", "digest": version.digest})
    source = store.publish_derived(kind="model", files={"s": b"s"})
    store.write_record(
        "runs/c.json",
        {"id": "c", "name": "x", "state": "running", "started": "2026-01-01", "host": "elsewhere",
         "stages": {}, "config": {"model": {"source": f"artifact:{source.digest[:12]}"}}},
    )  # fmt: skip
    lost = store.publish_derived(kind="model", files={"lost": b"x" * 5000})
    everything = ["--keep-days", "0", "--grace-hours", "0"]

    assert "Would delete 0 artifacts" in rlhf("artifacts", "gc", code=0).stdout
    shown = rlhf("artifacts", "gc", *everything, code=0).stdout
    assert lost.ref in shown and "Would delete 1 artifacts, 1 files (5.0 KB)" in shown
    assert "3 artifacts are kept" in shown and "add --yes to delete" in shown
    assert lost in open_store(store.url).list()
    done = rlhf("artifacts", "gc", *everything, "--yes", code=0).stdout
    assert "Deleted 1 artifacts, 1 files (5.0 KB)" in done
    assert set(open_store(store.url).list()) == {used, version, source}

    for name in "abc":  # ended long ago
        record = store.read_record(f"runs/{name}.json")
        store.write_record(
            f"runs/{name}.json",
            {**record, "state": "completed", "updated": "2026-01-01T00:00:00+00:00"},
        )
    rlhf("artifacts", "gc", *everything, "--yes", code=0)
    assert open_store(store.url).list() == [version]


@pytest.fixture
def here(filled, monkeypatch):
    """Runs a command in this process, on the filled store; returns what it prints."""
    monkeypatch.setenv("RLHF_STORE", filled[0].url)

    def run(*arguments):
        done = CliRunner().invoke(app, arguments)
        assert done.exception is None, done.output
        return done.output

    return run


def test_control_sequences_of_a_store_never_reach_the_terminal(rlhf, filled, here):
    """Another person's run, model or reason could hide lines, or fill the clipboard."""
    store, _ = filled
    evil = "\x1b]52;c;cm0gLXJm\x07\x1b[2J\x9b1A\r\u202egnp.exe\nERROR  all is well"
    record = {**store.read_record("runs/a.json"), "name": evil, "error": evil, "author": evil}
    store.write_record("runs/a.json", record)
    model = store.publish_derived(
        kind="model", files={"config.json": b"{ }"}, metadata={"algorithm": evil, "name": evil}
    )
    registry.promote(store, "chat", model.digest, run=evil, reason=evil)
    for arguments in (
        ["runs"], ["runs", "--json"], ["runs", "--metrics"], ["artifacts", "list"],
        ["artifacts", "show", model.ref], ["artifacts", "tree", model.ref],
        ["models", "list"], ["models", "show", "chat"], ["models", "show", "chat", "--json"],
    ):  # fmt: skip
        said = here(*arguments)
        assert not CONTROLS.search(said), arguments
        assert "gnp.exe" in said and "\nERROR" not in said, arguments
        if "--json" in arguments:
            assert [json.loads(line) for line in said.splitlines()]
    said = fails(rlhf, "artifacts", "show", evil.replace("\n", ""))
    assert "gnp.exe" in said and not CONTROLS.search(said)


def test_commands_print_through_the_one_function_that_cleans():
    for path in Path(listing.__file__).parent.glob("*.py"):
        if path.name not in ("output.py", "supervisor.py"):
            assert not re.search(r"typer\.s?echo\(|(?<!\w)print\(", path.read_text()), path.name


def test_runs_show_owner_duration_and_metrics(rlhf, filled):
    store, _ = filled
    models = {"policy": {"kl_mean": 1.25, "length_mean": 20.0}}
    evaluate = {"digest": "0" * 64, "kind": "evaluation", "reused": False,
                "metrics": {"win_rate": {"gold": {"rate": 0.625}}, "models": models}}  # fmt: skip
    store.write_record("runs/20260101-000000-abc-tone.json", {
        "id": "20260101-000000-abc-tone", "name": "tone", "author": "ada", "state": "completed",
        "started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T01:02:03+00:00",
        "stages": {"evaluate": evaluate},
    })  # fmt: skip
    line = next(x for x in rlhf("runs", code=0).stdout.splitlines() if "tone" in x)
    assert re.split(r"  +", line)[:4] == ["20260101-000000-abc", "tone", "ada", "completed"]
    assert "1 h 2 min" in line and "win (gold) 0.625, KL 1.25, length 20" in line


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (None, "id"),
        ({"state": None}, "state"),
        ({"stages": {"sft": {}}}, "stages.sft.digest"),
        ({"stages": []}, "stages"),
        ({"error": 5}, "error"),
        ({"config": "x"}, "config"),
    ],
)
def test_record_of_a_run_that_cannot_be_used_is_named_and_left_out(
    filled, here, caplog, change, where
):
    store, artifact = filled
    bad = {} if change is None else {**store.read_record("runs/b.json"), "id": "c", **change}
    store.write_record("runs/c.json", {**bad, "about": artifact.digest})
    for arguments in (["runs"], ["runs", "--json"], ["runs", "--metrics"], ["compare", "a", "b"]):
        caplog.clear()
        assert here(*arguments)
        assert f"runs/c.json in {store.url} is left out" in caplog.text and where in caplog.text
    assert [r["id"] for r in map(json.loads, here("runs", "--json").splitlines())] == ["b", "a"]
    assert catalogue(store)[0].id == "b"
    for name in "ab":  # what it names may still be needed
        store.delete_record(f"runs/{name}.json")
    everything = ["--keep-days", "0", "--grace-hours", "0"]
    assert "Would delete 0 artifacts" in here("artifacts", "gc", *everything)


def test_evaluation_that_was_deleted_leaves_the_others_on_the_leaderboard(filled, here):
    store, _ = filled
    gone = {"evaluate": {"digest": "0" * 64, "kind": "evaluation"}}
    record = store.read_record("runs/a.json")
    store.write_record("runs/a.json", {**record, "stages": gone})
    assert {line[:1] for line in here("runs", "--metrics").splitlines()} >= {"a", "b"}


def test_lists_are_json_too(here, filled):
    ref = filled[1].ref
    for arguments, key in (
        (["artifacts", "list"], "artifact"), (["artifacts", "show", ref], "artifact"),
        (["artifacts", "tree", ref], "artifact"), (["artifacts", "verify"], "problems"),
        (["presets"], "description"), (["compare", "a", "b"], "rows"),
        (["runs", "--metrics"], "run"), (["artifacts", "gc"], "kept"),
        (["doctor", "--parameters", "1B", "--gpus", "2", "--gpu-memory", "80"], "fits"),
    ):  # fmt: skip
        lines = here(*arguments, "--json").splitlines()
        assert lines and all(key in json.loads(line) for line in lines), arguments


def test_store_of_the_running_system_is_named_where_another_is_empty(rlhf, running):
    said = rlhf("runs", "--store", "elsewhere", code=0).stdout
    assert "The system that runs here has another store, s3://rlhf/store" in said
