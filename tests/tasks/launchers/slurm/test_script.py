"""The batch script and its submission, as text that real shells read."""

import shlex
import subprocess

import pytest
from pydantic import ValidationError

from rlhf_core.jobs import EvaluateJob, Resources, SFTJob
from rlhf_core.jobs.launchers import SlurmContainer, SlurmLauncher
from tasks.launchers.slurm.output import JobOutput
from tasks.launchers.slurm.script import batch_script, output_path, passed, submission
from tasks.launchers.slurm.shell import Shell

AGENT = ["python3", "-m", "agent", "--attempt", "$RLHF_ATTEMPT", "--node-rank", "$SLURM_NODEID"]


def script(settings, **resources):
    job = SFTJob(model="0" * 64, data="1" * 64, resources=Resources(**resources))
    return batch_script(settings, "rlhf-sft-1", job, AGENT)


def options(text):
    lines = [x for x in text.splitlines() if x.startswith("#SBATCH ")]
    return [x.removeprefix("#SBATCH ") for x in lines]


def srun(text):
    [line] = [x for x in text.splitlines() if x.startswith("srun ")]
    return shlex.split(line.removesuffix(" &"))


def test_options_follow_from_settings_and_resources():
    settings = SlurmLauncher(
        folder="/shared/out", partition="h100", account="nlp", qos="high", constraint="ib&nvme",
        time_limit="1-12:00:00", cpus_per_rank=8, exclusive=True, options=("--mem=0",),
    )  # fmt: skip
    assert options(script(settings, nodes=2, ranks=4)) == [
        "--job-name=rlhf-sft-1", "--nodes=2", "--ntasks-per-node=1",
        "--output=/shared/out/%x-%j.log", "--open-mode=append", "--requeue", "--signal=B:USR1@120",
        "--partition=h100", "--account=nlp", "--qos=high", "--constraint=ib&nvme",
        "--gpus-per-node=4", "--cpus-per-task=32", "--time=1-12:00:00", "--exclusive", "--mem=0",
    ]  # fmt: skip
    assert output_path(settings, "rlhf-sft-1", "7") == "/shared/out/rlhf-sft-1-7.log"


@pytest.mark.parametrize(
    ("settings", "resources", "asked"),
    [
        ({}, {"ranks": 2}, ["--gpus-per-node=2"]),
        ({}, {"ranks": 2, "device": "cpu"}, []),
        ({"gpus_per_node": 0}, {"ranks": 2}, []),
        ({"gres": "gpu:a100:4"}, {"ranks": 2}, ["--gres=gpu:a100:4"]),
    ],
)
def test_gpus_are_asked_for_as_the_ranks_need_them(settings, resources, asked):
    found = options(script(SlurmLauncher(**settings), **resources))
    assert [x for x in found if "gpu" in x] == asked


def test_step_runs_one_agent_on_each_node_with_its_own_rank():
    command = srun(script(SlurmLauncher(), nodes=2))
    assert command[:2] == ["srun", "--kill-on-bad-exit=1"] and "--label" in command
    step = f'exec {shlex.join(AGENT[:4])} "$RLHF_ATTEMPT" --node-rank "$SLURM_NODEID"'
    assert command[-3:] == ["sh", "-c", step.replace("--attempt '", "--attempt ")]
    assert "--label" not in srun(script(SlurmLauncher(), nodes=1))


def test_containers_are_pyxis_options_or_apptainer_commands():
    pyxis = SlurmContainer(runtime="pyxis", image="ghcr.io#a/b:1", mounts=("/data", "/x:/y"))
    command = srun(script(SlurmLauncher(container=pyxis)))
    assert "--container-image=ghcr.io#a/b:1" in command
    assert "--container-mounts=/data:/data,/x:/y" in command
    box = SlurmContainer(runtime="apptainer", image="/images/rlhf.sif", mounts=("/data",))
    step = srun(script(SlurmLauncher(container=box)))[-1]
    assert step.startswith(
        "exec apptainer exec --nv --bind=/data:/data /images/rlhf.sif python3 -m"
    )


def test_script_is_valid_shell():
    text = script(SlurmLauncher(setup=("module load cuda", "source ~/env/bin/activate")), nodes=2)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert "module load cuda\nsource ~/env/bin/activate\nexport RLHF_ATTEMPT" in text


def test_settings_cannot_end_a_line_of_the_script():
    for field in ("partition", "constraint", "folder", "python"):
        with pytest.raises(ValidationError):
            SlurmLauncher(**{field: "main\nrm -rf x"})
    with pytest.raises(ValidationError):
        SlurmLauncher(options=("--mem=0\n--x",))
    with pytest.raises(ValidationError):
        SlurmLauncher(time_limit="2 hours")


def test_secrets_are_in_the_jobs_environment_and_not_in_its_script(monkeypatch, tmp_path):
    """A stand-in for sbatch writes what it got: arguments, script and environment."""
    (tmp_path / "sbatch").write_text(
        '#!/bin/bash\necho "$*" > $OUT/arguments\ncat > $OUT/script\nenv > $OUT/environment\n'
        "echo '12;cluster'\n"
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "it's a,b $hidden")
    monkeypatch.setenv("SBATCH_PARTITION", "replaces the setting")
    monkeypatch.setenv("PREFECT_API_KEY", "not for jobs")
    settings = SlurmLauncher(folder=str(tmp_path / "out"))
    text = script(settings)
    done = Shell().run(submission(settings, text, passed(settings)))
    assert (done.code, done.text) == (0, "12;cluster\n"), done.stderr
    assert (tmp_path / "script").read_text() == text and "hidden" not in text
    assert (tmp_path / "arguments").read_text() == "--parsable\n"
    environment = (tmp_path / "environment").read_text()
    assert "AWS_SECRET_ACCESS_KEY=it's a,b $hidden\n" in environment
    assert "PREFECT_" not in environment and "SBATCH_" not in environment
    assert (tmp_path / "out").is_dir()


def test_jobs_without_ranks_get_no_gpu():
    job = EvaluateJob.model_construct(resources=Resources(nodes=1, ranks=4))
    assert "--gpus-per-node=4" in options(batch_script(SlurmLauncher(), "n", job, AGENT))
    plain = SFTJob.model_construct(resources=Resources(ranks=4))
    object.__setattr__(plain, "torchrun", False)
    assert not [x for x in options(batch_script(SlurmLauncher(), "n", plain, AGENT)) if "gpu" in x]


def test_output_is_split_into_lines_progress_and_what_slurm_says_itself(tmp_path):
    lines, progress = [], []
    output = JobOutput(tmp_path / "log", lines.append, progress.append, labelled=True)
    output.feed(first := b'0: step 1\n1: hello\nsrun: error: n2\n0: rlhf-progress {"st')
    output.feed(second := b'ep": 3}\nrlhf: job 5 on n[1-2]\n1: 10%\r1: 50%\r1: done\n0: last')
    output.feed(b"", last=True)
    assert lines == ["step 1", "node 1: hello", "rlhf: job 5 on n[1-2]", "node 1: done", "last"]
    assert progress == [{"step": 3}]
    log = (tmp_path / "log").read_text()
    assert "srun: error: n2\n" in log and log.endswith("0: last\n")
    assert output.offset == len(first) + len(second)
