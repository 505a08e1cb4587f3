from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.jobs import PipelineConfig
from rlhf_core.model_files.source_check import hub_file_problems
from rlhf_core.pipeline.presets import build_config
from rlhf_core.preflight.check import check, dry_run
from rlhf_core.preflight.memory import GIB
from rlhf_core.store import open_store
from rlhf_core.system.machine import Machine, parse_gpus, this_machine
from tests.rlhf_core.preflight.test_memory import BLOOM_560M, LLAMA_7B
from tests.rlhf_core.tiny_models import copy_of

CPU = Machine(cores=2, ram=24 * GIB)
FOUR = Machine(gpus=4, gpu_memory=40 * GIB, cores=32, ram=256 * GIB)
EIGHT = Machine(gpus=8, gpu_memory=80 * GIB, cores=96, ram=2048 * GIB)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLHF_STORE", f"file://{tmp_path}/store")


def config(**settings: Any) -> PipelineConfig:
    return PipelineConfig.model_validate({"model": {"source": "random:llama"}, **settings})


def only_problem(machine: Machine = CPU, **settings: Any) -> str:
    problems = dry_run(config(**settings), machine)
    assert len(problems) == 1, problems
    return problems[0]


def test_defaults_pass_on_a_small_machine() -> None:
    assert dry_run(PipelineConfig(), CPU) == []
    assert check(config(), machine=CPU) == []


def test_own_questions_are_read_before_a_run_starts(tmp_path: Path) -> None:
    source = tmp_path / "questions.jsonl"
    source.write_text('{"question": "1 + 1?"}\n')
    evaluate = {"questions": str(source)}
    [problem] = check(config(evaluate=evaluate), machine=CPU)
    assert problem.startswith("evaluate.questions: ") and "answers" in problem
    source.write_text('{"question": "1 + 1?", "answers": "2"}\n')
    assert check(config(evaluate=evaluate), machine=CPU) == []
    source.unlink()
    [problem] = check(config(evaluate=evaluate), machine=CPU)
    assert "evaluate.questions" in problem and "questions.jsonl" in problem


@pytest.mark.parametrize(
    ("preset", "machine", "model"),
    [
        ("smoke", CPU, None),
        ("demo", CPU, None),
        ("bloom-560m", FOUR, BLOOM_560M),
        ("llama-7b", EIGHT, LLAMA_7B),
    ],
)
def test_presets_pass_a_dry_run_on_their_machine(
    preset: str, machine: Machine, model: dict[str, Any] | None
) -> None:
    assert dry_run(build_config(preset), machine, model) == []


def test_all_problems_come_in_one_list() -> None:
    problems = dry_run(
        config(
            resources={"ranks": 3, "strategy": "fsdp2", "device": "cuda"},
            sft={"batch_size": 32, "trainable_layers": 9},
            evaluate={"samples": 200},
        ),
        CPU,
    )
    text = "\n".join(problems)
    assert "device is cuda" in text
    assert "sft.batch_size is 32" in text
    assert "sft.trainable_layers is 9, but random:llama has 3 layers" in text
    assert "evaluate.samples is 200" in text


def test_near_seeds_of_reasoning_gym_are_refused_with_the_seed_to_set() -> None:
    def data(seed: int) -> dict[str, Any]:
        first = {"source": "reasoning-gym:leg_counting?size=200&seed=3", "heldout_fraction": 0.1}
        return {"sft": first, "prompts": {"source": f"reasoning-gym:leg_counting?seed={seed}"}}

    problem = only_problem(data=data(4))
    assert problem.startswith("data.sft.source and data.prompts.source: seeds 3 and 4 of task")
    assert "share up to 199 of 500 questions" in problem and "set the second seed to 203" in problem
    assert dry_run(config(data=data(203)), CPU) == dry_run(config(data=data(3)), CPU) == []


def test_batch_that_ranks_do_not_share() -> None:
    problem = only_problem(sft={"batch_size": 32, "resources": {"ranks": 3}})
    assert "sft.batch_size is 32" in problem
    assert "30 or 33" in problem


def test_batch_that_the_micro_batch_does_not_divide() -> None:
    problem = only_problem(reward={"batch_size": 20, "resources": {"micro_batch_size": 8}})
    assert "20 for each of 1 rank" in problem
    assert "set micro_batch_size to 10, or reward.batch_size to 16 or 24" in problem
    # Smaller than a micro-batch is fine.
    assert dry_run(config(reward={"batch_size": 4, "resources": {"micro_batch_size": 8}})) == []


def test_minibatches_that_do_not_divide() -> None:
    assert "63 or 66" in only_problem(ppo={"batch_size": 64, "minibatches": 3})
    two = {"ranks": 2, "micro_batch_size": 1}
    problem = only_problem(ppo={"batch_size": 6, "minibatches": 2, "resources": two})
    assert "multiple of 4: nearest are 4 or 8" in problem


def test_more_ranks_than_gpus() -> None:
    problem = only_problem(FOUR, resources={"ranks": 8})
    assert "resources.ranks is 8 (for sft, data.preference, reward, ppo, evaluate)" in problem
    assert "at most 4" in problem


def test_judge_of_pairs_needs_its_key_and_no_reward_model(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = {"url": "http://localhost:1/v1", "model": "m", "key_variable": "PAIR_KEY"}
    run = config(stages=["sft", "online_dpo"], online_dpo={"rewards": [], "judge": judge})
    monkeypatch.delenv("PAIR_KEY", raising=False)
    [problem] = check(run, machine=CPU)
    assert problem.startswith("online_dpo.judge: The judge's key comes from the environment vari")
    assert "PAIR_KEY, which is not set" in problem
    monkeypatch.setenv("PAIR_KEY", "marked-0123456789")
    remarks: list[str] = []
    assert check(run, machine=CPU, remarks=remarks) == []
    assert any(r.startswith("online_dpo.judge: nothing answers at http") for r in remarks)
    assert "marked" not in str(remarks)


def test_nodes_that_the_launcher_does_not_have() -> None:
    problem = only_problem(resources={"nodes": 2})
    assert problem == (
        "resources.nodes is 2 (for sft, data.preference, reward, ppo, evaluate), but launcher.type "
        "is local, which runs a stage on one machine; set nodes to 1, or launcher.type to slurm or "
        "kubernetes"
    )
    pool = {"type": "work_pool"}
    problem = only_problem(launcher=pool, sft={"resources": {"nodes": 4, "micro_batch_size": 8}})
    assert problem.startswith("sft.resources.nodes is 4 (for sft), but launcher.type is work_pool")


def test_batch_is_shared_by_the_ranks_of_all_nodes() -> None:
    place = {"nodes": 3, "ranks": 2, "micro_batch_size": 4}
    problems = dry_run(config(sft={"batch_size": 16, "resources": place}))
    assert any("which 6 ranks do not share evenly" in text for text in problems)
    assert len(dry_run(config(sft={"batch_size": 24, "resources": place}))) == 1


def test_gpus_that_are_not_there() -> None:
    assert "sft.resources.device is cuda" in only_problem(sft={"resources": {"device": "cuda"}})


def test_strategy_that_needs_a_gpu() -> None:
    assert "needs GPUs" in only_problem(ppo={"resources": {"strategy": "zero2_cpu"}})


def test_huge_batch_is_judged_at_once() -> None:
    text = only_problem(sft={"batch_size": 2**31 - 1, "resources": {"micro_batch_size": 2**20}})
    assert "set micro_batch_size to 1," in text  # a prime number


def test_precision_that_does_not_fit() -> None:
    assert "fp16, which needs a GPU" in only_problem(sft={"precision": "fp16"})
    fsdp2 = {"strategy": "fsdp2", "ranks": 4}
    problem = only_problem(FOUR, ppo={"precision": "fp16", "resources": fsdp2})
    assert "fsdp2 has no loss scaling" in problem


def test_lora_rank_beyond_the_width() -> None:
    assert "hidden size (64)" in only_problem(sft={"lora": {"rank": 128}})


def test_lora_targets_that_the_model_could_not_store() -> None:
    def text(model: str, stage: str, *targets: str) -> str:
        return only_problem(
            model={"source": f"random:{model}"}, **{stage: {"lora": {"targets": targets}}}
        )

    found = text("qwen2", "sft", "q_proj", "lm_head")
    assert found.startswith("sft.lora.targets has 'lm_head', which shares its weights with embed_t")
    assert "valid are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj," in found
    assert "valid are c_attn, c_fc, c_proj, or" in text("gpt2", "ppo", "q_proj")
    assert "shares its weights with lm_head" in text("bloom", "sft", "word_embeddings")
    assert "the reward model, a model without vocab" in text("llama", "reward", "lm_head")
    assert "the critic, a model without vocabulary" in text("llama", "ppo", "lm_head")
    valid = {"lora": {"targets": ("embed_tokens", "0.self_attn.q_proj")}}
    assert (
        dry_run(config(sft={"lora": {"targets": ("lm_head",)}}, reward=valid, ppo=valid), CPU) == []
    )


def test_quantised_weights_need_adapters_in_every_stage_and_ddp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nf4 = {"source": "random:llama", "quantization": "nf4"}
    lora = {"lora": {"rank": 4}}
    text = only_problem(model=nf4, sft=lora, ppo=lora)
    assert text.startswith("model.quantization is nf4, which needs lora in reward, because")
    sharded = {**lora, "resources": {"strategy": "zero2"}}
    text = only_problem(model=nf4, sft=lora, reward=lora, ppo=sharded)
    assert text.startswith("ppo.resources.strategy is zero2, but model.quantization is nf4")
    whole = config(model=nf4, sft=lora, reward=lora, ppo=lora)
    assert dry_run(whole, CPU) == []
    monkeypatch.setattr("rlhf_core.preflight.check.find_spec", lambda name: None)
    (text,) = [text for text in check(whole, machine=CPU) if "bitsandbytes" in text]
    assert text.endswith("run: pip install bitsandbytes")


def test_lengths_beyond_the_context() -> None:
    assert "context of 1024" in only_problem(data={"sft": {"max_length": 2048}})
    problem = only_problem(ppo={"max_new_tokens": 600}, evaluate={"max_new_tokens": 64})
    assert "512 tokens" in problem
    assert "make 1112" in problem
    assert "max_prompt_length to 424" in problem
    assert "lower it" in only_problem(reward={"max_new_tokens": 5000})
    # bloom has no longest position
    bloom = {"source": "random:bloom"}
    assert dry_run(config(model=bloom, data={"sft": {"max_length": 4096}}), CPU) == []


def test_prompt_limit_beyond_the_length() -> None:
    problem = only_problem(data={"prompts": {"max_length": 100, "max_prompt_length": 200}})
    assert "max_prompt_length is 200" in problem


def test_shares_that_leave_nothing() -> None:
    assert "nothing to train on" in only_problem(data={"sft": {"heldout_fraction": 1.0}})
    assert "held-out prompts" in only_problem(data={"prompts": {"heldout_fraction": 0}})
    text = only_problem(sft={"eval_every": 5}, data={"sft": {"heldout_fraction": 0}})
    assert text.startswith("sft.eval_every is 5, but data.sft.heldout_fraction is 0")


def test_margins_that_the_pairs_do_not_have() -> None:
    pairs = {"source": "pairs.jsonl"}
    text = only_problem(reward={"margin_coef": 1}, data={"preference": pairs})
    assert "data.preference.columns: {margin: <its name>}" in text
    named = {"preference": pairs | {"columns": {"margin": "rating"}}}
    assert dry_run(config(reward={"margin_coef": 1}, data=named), CPU) == []
    assert dry_run(config(reward={"margin_coef": 1}), CPU) == [], "sampled pairs have them"


def test_pretraining_data_that_would_not_be_used() -> None:
    assert "ptx_coef is 0" in only_problem(data={"ptx": {}})
    assert dry_run(config(data={"ptx": {}}, ppo={"ptx_coef": 1.0}), CPU) == []


def test_model_that_does_not_fit_the_memory() -> None:
    small = Machine(gpus=8, gpu_memory=24 * GIB, cores=8, ram=4096 * GIB)
    problems = dry_run(build_config("llama-7b"), small, LLAMA_7B)
    text = "\n".join(problems)
    assert "ppo with strategy fsdp2 needs about" in text
    assert "a GPU of 24 GiB" in text
    tiny = Machine(cores=2, ram=3 * GIB)
    problems = dry_run(PipelineConfig(), tiny)
    assert any("sft with strategy ddp" in p and "trainable_layers 7" in p for p in problems)


def test_main_memory_that_checkpoints_need() -> None:
    little = Machine(gpus=8, gpu_memory=80 * GIB, cores=96, ram=64 * GIB)
    problems = dry_run(build_config("llama-7b"), little, LLAMA_7B)
    assert any("main memory for its ranks" in p for p in problems)


def test_model_sources_that_cannot_be_used(tmp_path: Path) -> None:
    assert "does not exist" in only_problem(model={"source": "./nowhere"})
    assert "no revisions" in only_problem(model={"source": "random:llama", "revision": "v1"})
    folder = copy_of("llama", tmp_path / "model")
    good = config(model={"source": str(folder)})
    assert check(good, machine=CPU) == []
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    (problem,) = check(good, machine=CPU)
    assert "truncated" in problem
    weights.write_bytes(data)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{m['content']}}{% endfor %}"
    )
    (problem,) = check(good, machine=CPU)
    assert "no end-of-turn token" in problem
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**value, "auto_map": {"AutoConfig": "x.Y"}}))
    (problem,) = check(good, machine=CPU)
    assert "trust_remote_code" in problem


def _pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\nsize 9\n"
    )


def _html(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html>" * 9)


def _lost_tensor(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state["model.odd.weight"] = state.pop("model.norm.weight")
    save_file(state, folder / "model.safetensors")


def _other_vocabulary(folder: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    value["added_tokens"].append({**value["added_tokens"][0], "id": 5000, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(value))


def _odd_config(folder: Path) -> None:
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**value, "num_hidden_layers": "two"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_pointer, ["git-lfs pointer", "git lfs install"]),
        (_html, ["HeaderTooLarge", "download it again"]),
        (_lost_tensor, ["(model.norm.weight)", "(model.odd.weight)", "belong together"]),
        (_other_vocabulary, ["tokens up to id 5,000", "resize_token_embeddings"]),
        (_odd_config, ["num_hidden_layers 'two'", "copy the file"]),
    ],
)
def test_unusable_model_folder_is_refused_with_the_way_out(
    tmp_path: Path, damage: Callable[[Path], None], words: list[str]
) -> None:
    folder = copy_of("llama", tmp_path / "model")
    damage(folder)
    (problem,) = check(config(model={"source": str(folder)}), machine=CPU)
    assert str(folder) in problem
    assert all(word in problem for word in words), problem


def test_artifact_of_another_kind(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x")
    artifact = store.publish(tmp_path / "a", kind="dataset")
    (problem,) = check(config(model={"source": f"artifact:{artifact.digest}"}), machine=CPU)
    assert "of kind 'dataset'" in problem
    (problem,) = check(config(model={"source": "artifact:abcdef01"}), machine=CPU)
    assert "abcdef01" in problem


def test_data_and_store_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("")
    problems = check(
        config(
            store=f"file://{tmp_path}/blocked/store",
            data={"sft": {"source": str(tmp_path / "none.jsonl")}},
        ),
        machine=CPU,
    )
    assert len(problems) == 2, problems
    assert problems[0].startswith("store: ")
    assert problems[1].startswith("data.sft: ")
    assert "none.jsonl" in problems[1]


def test_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    import rlhf_core.preflight.disk as preflight

    monkeypatch.setattr(preflight, "free_disk", lambda path: 1000)
    problems = check(config(), machine=CPU)
    assert any("RLHF_HOME" in p for p in problems)
    assert any("the setting store" in p for p in problems)


def test_files_at_the_hub_are_judged_by_name() -> None:
    good = ["config.json", "model.safetensors", "tokenizer.json", "onnx/model.bin"]
    assert hub_file_problems(good) == []
    (problem,) = hub_file_problems(["config.json", "pytorch_model.bin", "tokenizer.json"])
    assert "only pytorch_model.bin" in problem
    assert len(hub_file_problems(["README.md"])) == 3


def test_gpus_are_read_as_cuda_counts_them() -> None:
    table = (
        "0, GPU-aa11, NVIDIA H100 80GB HBM3, 81559, 81000\n"
        "1, GPU-bb22, NVIDIA H100 80GB HBM3, 81559, 500\n"
        "2, GPU-cc33, NVIDIA Odd, [N/A], [N/A]\n"
    )
    assert len(parse_gpus(table, None)) == 2
    assert parse_gpus(table, "1") == [("NVIDIA H100 80GB HBM3", 81559 << 20, 500 << 20)]
    assert len(parse_gpus(table, "GPU-bb,0")) == 2
    assert len(parse_gpus(table, "0,9,1")) == 1
    assert parse_gpus(table, "") == []


def test_this_machine_has_cores_and_memory() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.ram > GIB
