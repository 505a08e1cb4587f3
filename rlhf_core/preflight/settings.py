"""Checks of the settings alone: each part, and how the parts fit together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import gcd, isqrt
from typing import Any

from rlhf_core.data.sources.reasoning import is_reasoning, near_seeds
from rlhf_core.errors import DataError
from rlhf_core.jobs import (
    BaseJob,
    PipelineConfig,
    Resources,
    SampledPreferences,
    TrainSettings,
    job_class,
)
from rlhf_core.jobs.lora import target_problems
from rlhf_core.jobs.training import quantization_problem
from rlhf_core.model_files.expected_keys import layer_names
from rlhf_core.model_files.shape import ModelShape
from rlhf_core.pipeline import recipe
from rlhf_core.pipeline.placements import (
    device_of,
    placements,
    reply_length,
    response_tokens,
    samplers_of,
    section_at,
    too_few_gpus,
    trained_stages,
)
from rlhf_core.preflight.curricula import check_curricula
from rlhf_core.system.machine import Machine


def check_data_settings(config: PipelineConfig) -> list[str]:
    """Problems of held-out fractions and lengths, and data that would not be used."""
    problems = []
    for purpose, name, settings in recipe.data_sources(config):
        share = settings.heldout_fraction
        if share >= 1.0:
            problems.append(
                f"{name}.heldout_fraction is {share:g}, which leaves nothing to train on; "
                "expected less than 1: set 0.1"
            )
        if share <= 0.0 and purpose == "prompts":
            problems.append(
                f"{name}.heldout_fraction is 0, but the evaluation compares the models on held-out "
                "prompts; expected more than 0: set 0.1"
            )
        limit = settings.max_prompt_length
        if limit is not None and limit > settings.max_length:
            problems.append(
                f"{name}.max_prompt_length is {limit}, more than {name}.max_length "
                f"({settings.max_length}), which counts prompt and reply; lower it or raise "
                "max_length"
            )
    problems += _nothing_to_evaluate_on(config)
    mixing = [s for s in config.stages if hasattr(recipe.section(config, s), "ptx_coef")]
    if config.data.ptx is not None and not any(
        "ptx" in recipe.roles(config, stage).values() for stage in mixing
    ):
        setting = f"{mixing[0] if mixing else 'ppo'}.ptx_coef"
        problems.append(
            f"data.ptx is given but {setting} is 0, so that it would not be used; set {setting} "
            "(27.8 in InstructGPT) or clear data.ptx"
        )
    if config.evaluate.samples > config.evaluate.max_prompts:
        problems.append(
            f"evaluate.samples is {config.evaluate.samples}, more than evaluate.max_prompts "
            f"({config.evaluate.max_prompts}); lower it, or raise max_prompts"
        )
    preference, coef = config.data.preference, config.reward.margin_coef
    read = () if isinstance(preference, SampledPreferences) else preference.parts
    unnamed = any("margin" not in part.columns for part in read)
    if coef > 0 and "reward" in config.stages and unnamed:
        problems.append(
            f"reward.margin_coef is {coef:g}, but data.preference names no column with margins; "
            "set data.preference.columns: {margin: <its name>}, or clear margin_coef"
        )
    return problems + _near_seeds(config) + check_curricula(config)


def _nothing_to_evaluate_on(config: PipelineConfig) -> list[str]:
    """Stages that are evaluated in training, on a data set that holds no rows out."""
    whole = {
        name.rpartition(".")[2]: name
        for purpose, name, settings in recipe.data_sets(config)
        if purpose != "prompts" and all(p.heldout_fraction <= 0.0 for p in settings.parts)
    }
    problems = []
    for stage in config.stages:
        every = getattr(recipe.section(config, stage), "eval_every", None)
        roles = recipe.roles(config, stage).values() if every is not None else ()
        problems += [
            f"{stage}.eval_every is {every}, but {whole[role]}.heldout_fraction is 0, so there "
            "would be no rows to evaluate on; set it to 0.1, or clear eval_every"
            for role in roles
            if role in whole
        ]
    return problems


def _near_seeds(config: PipelineConfig) -> list[str]:
    """Data sets of reasoning-gym that differ, but share most of their questions."""
    sources = [(n, s.source) for _, n, s in recipe.data_sources(config) if is_reasoning(s.source)]
    problems = []
    for (name, source), (other, second) in itertools.combinations(sources, 2):
        try:
            found = near_seeds(source, second)
        except DataError:  # a malformed source is reported where it is opened
            continue
        if found:
            problems.append(f"{name}.source and {other}.source: {found}")
    return problems


def check_placements(config: PipelineConfig, machine: Machine) -> list[str]:
    """Missing GPUs, and strategies that need GPUs; one text for stages with the same problem."""
    alike: dict[str, list[str]] = {}
    for name, resources in placements(config).items():
        for text in _judge(resources, machine, name in config.stages, samplers_of(config, name)):
            alike.setdefault(text, []).append(name)
    return _of_stages(alike)


def check_nodes(config: PipelineConfig) -> list[str]:
    """Stages on more nodes than the launcher has, or on more GPUs than it asks for."""
    alike: dict[str, list[str]] = {}
    for name, resources in placements(config).items():
        if text := too_few_gpus(config, name, resources):
            alike.setdefault(text, []).append(name)
        if text := config.launcher.nodes_problem(resources, "{}"):
            alike.setdefault(text.replace(", but", " (for {}), but", 1), []).append(name)
    return _of_stages(alike)


def _of_stages(alike: Mapping[str, list[str]]) -> list[str]:
    """Texts with two placeholders, see `_judge`, each for the stages that have the problem."""
    return [
        text.format("resources" if len(names) > 1 else f"{names[0]}.resources", ", ".join(names))
        for text, names in alike.items()
    ]


def check_placement(job: BaseJob, machine: Machine) -> list[str]:
    """Problems of one job's resources on a machine; workers check this before they start it."""
    if not job.torchrun:
        return []
    trains = isinstance(job, TrainSettings)
    return [
        text.format("resources", job.module.rsplit(".", 1)[1])
        for text in _judge(job.placement(), machine, trains, job.samplers)
    ]


def _judge(resources: Resources, machine: Machine, trains: bool, samplers: int = 0) -> list[str]:
    """Texts with two placeholders: the setting, and the stages that it applies to."""
    device = device_of(resources, machine)
    if resources.device == "cuda" and machine.gpus == 0:
        return [
            "{}.device is cuda (for {}), but this machine shows no GPU (nvidia-smi, "
            "CUDA_VISIBLE_DEVICES); set auto or cpu"
        ]
    problems = []
    if device == "cuda" and resources.ranks > machine.gpus:
        problems.append(
            f"{{}}.ranks is {resources.ranks} (for {{}}), but this machine has {machine.gpus} "
            f"GPU{'s' if machine.gpus != 1 else ''} and each rank needs its own; set ranks to at "
            f"most {machine.gpus}"
        )
    elif device == "cuda" and resources.ranks + samplers > machine.gpus:
        problems.append(
            f"{{}}.ranks is {resources.ranks} (for {{}}) beside {samplers} GPUs for samplers "
            f"(rollout.ranks), but this machine has {machine.gpus} GPUs and each process needs its "
            "own; lower one of them, or set rollout.placement to colocated"
        )
    if trains and device == "cpu" and resources.strategy == "zero2_cpu":
        problems.append(
            "{}.strategy is zero2_cpu (for {}), which needs GPUs, and these ranks would run on the "
            "CPU; use ddp, zero1, zero2 or fsdp2"
        )
    return problems


def check_batches(config: PipelineConfig) -> list[str]:
    """Batch sizes that are not divisible by minibatches, ranks or micro-batches."""
    problems = []
    for stage, settings, resources, _ in trained_stages(config):
        ranks, micro = resources.world_size, resources.micro_batch_size
        group = getattr(settings, "group_size", 1)
        batch, what = settings.batch_size * group, f"{stage}.batch_size is {settings.batch_size}"
        if group > 1:
            what += f" (times group_size {group}: {batch} replies)"
        minibatches = getattr(settings, "minibatches", 1)
        if minibatches > 1:
            parts = minibatches
            if batch % parts:
                problems.append(
                    f"{what}, which {parts} minibatches do not divide; nearest are "
                    f"{_nearest(settings.batch_size, parts // gcd(parts, group))}"
                )
                continue
            batch //= parts
            what += f", {batch} in each of {parts} minibatches"
        if batch % ranks:
            parts, batch_unit = ranks, ranks * minibatches
            batch_unit //= gcd(batch_unit, group)
            problems.append(
                f"{what}, which {parts} ranks do not share evenly; {stage}.batch_size must be a "
                f"multiple of {batch_unit}: nearest are "
                f"{_nearest(settings.batch_size, batch_unit)}"
            )
        elif (share := batch // ranks) > micro and share % micro:
            near = min(_divisors(share), key=lambda m: (abs(m - micro), -m))
            unit = minibatches * ranks * micro
            unit //= gcd(unit, group)
            problems.append(
                f"{what}, so {share} for each of {ranks} rank{'s' if ranks > 1 else ''}, which "
                f"micro_batch_size {micro} does not divide; set micro_batch_size to {near}, or "
                f"{stage}.batch_size to {_nearest(settings.batch_size, unit)}"
            )
    return problems


def _divisors(number: int) -> list[int]:
    small = [m for m in range(1, isqrt(number) + 1) if number % m == 0]
    return small + [number // m for m in small]


def _nearest(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def check_training(config: PipelineConfig, shape: ModelShape | None, machine: Machine) -> list[str]:
    """Precision, strategy, layers and adapters that are not compatible."""
    problems = []
    for stage, settings, resources, _ in trained_stages(config):
        device = device_of(resources, machine)
        if settings.precision == "fp16" and device == "cpu":
            problems.append(
                f"{stage}.precision is fp16, which needs a GPU, and this stage would run on the "
                "CPU; use bf16 or fp32"
            )
        if settings.precision == "fp16" and resources.strategy == "fsdp2":
            problems.append(
                f"{stage}.precision is fp16, but the strategy fsdp2 has no loss scaling; "
                "use bf16, or the strategy zero2 on GPUs without bf16"
            )
        layers = settings.trainable_layers
        if shape is not None and layers is not None and layers > shape.layers:
            problems.append(
                f"{stage}.trainable_layers is {layers}, but {config.model.source} has "
                f"{shape.layers} layers; set at most {shape.layers}, or leave it empty to train "
                "everything"
            )
        lora = settings.lora
        if shape is not None and lora is not None and lora.rank > shape.hidden:
            problems.append(
                f"{stage}.lora.rank is {lora.rank}, more than the model's hidden size "
                f"({shape.hidden}), which is no longer low-rank; set 8 to 64"
            )
    return problems


def check_adapters(config: PipelineConfig, model: Mapping[str, Any] | None) -> list[str]:
    """Stages that cannot train with quantised weights, and targets of adapters that the model does
    not have, or that share their weights.

    Args:
        model: config.json of the base model. No target is checked without it, nor for an
            architecture whose layers it does not tell: those are checked when the stage starts.
    """
    problems = []
    for stage, settings, resources, _ in trained_stages(config):
        text = quantization_problem(config.model.quantization, settings, resources, stage)
        problems += [] if text is None else [text]
        job = job_class(stage)
        if settings.lora is None or model is None:
            continue
        whole = layer_names(model)
        backbone = layer_names(model, backbone=True)
        if whole is None or backbone is None:
            continue
        found = [] if job.kind == "reward_model" else target_problems(settings.lora, whole)
        if not found and (job.kind == "reward_model" or getattr(job, "critic", False)):
            who = "critic" if getattr(job, "critic", False) else "reward model"
            found = [
                text.replace("this model", f"the {who}, a model without vocabulary head,")
                for text in target_problems(settings.lora, backbone)
            ]
        problems += [f"{stage}.lora.{text}" for text in found]
    return problems


def check_lengths(config: PipelineConfig, shape: ModelShape | None) -> list[str]:
    """Lengths that exceed the model's context."""
    if shape is None or shape.context is None:
        return []
    problems = []
    context, model = shape.context, config.model.source
    for _, name, settings in recipe.data_sources(config):
        if settings.max_length > context:
            problems.append(
                f"{name}.max_length is {settings.max_length}, but {model} has a context of "
                f"{context} tokens; set at most {context}"
            )
    if "pretrain" in config.stages and config.pretrain.length > context:
        problems.append(
            f"pretrain.length is {config.pretrain.length}, but {model} has a context of {context} "
            f"tokens; set at most {context}"
        )
    longest = config.data.prompts.longest_prompt
    sections = {name: section_at(config, name) for name in placements(config)}
    replies = {name: response_tokens(section) for name, section in sections.items()}
    if "evaluate" in replies:
        replies["evaluate"] = reply_length(config)
    for name, new in replies.items():
        episodes = getattr(sections[name], "environment", None) is not None
        limit = f"{name}.environment.max_episode_tokens" if episodes else f"{name}.max_new_tokens"
        if new >= context:
            room = context - longest
            most = f" to at most {room} (prompts have up to {longest})" if room > 0 else ""
            problems.append(
                f"{limit} is {new}, but {model} has a context of {context} tokens "
                f"for prompt and reply together; lower it{most}"
            )
        elif longest + new > context and longest <= context:
            problems.append(
                f"prompts of up to {longest} tokens (data.prompts.max_prompt_length, else "
                f"max_length) and {limit} {new} make {longest + new}, but {model} "
                f"has a context of {context} tokens; set data.prompts.max_prompt_length to "
                f"{context - new}, or fewer new tokens"
            )
    return problems
