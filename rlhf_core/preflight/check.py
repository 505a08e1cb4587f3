"""Preflight: checks a pipeline before it starts, and lists all problems. Does not import torch.

Each problem is one text: what was found, what is needed, what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from rlhf_core.errors import RLHFError
from rlhf_core.jobs import (
    LmEvalSettings,
    LocalLauncher,
    ModelSettings,
    PipelineConfig,
)
from rlhf_core.judges.lexicon import PACKAGES
from rlhf_core.model_files.shape import ModelShape, read_shape
from rlhf_core.model_files.source_check import check_model, model_config, new_model_sizes
from rlhf_core.pipeline import recipe
from rlhf_core.pipeline.placements import device_of, trained_stages
from rlhf_core.preflight.answers import check_answers
from rlhf_core.preflight.disk import check_disk
from rlhf_core.preflight.environments import check_environments
from rlhf_core.preflight.fitting import ways_to_fit
from rlhf_core.preflight.memory import GIB
from rlhf_core.preflight.memory import estimate as estimate_memory
from rlhf_core.preflight.rollout import check_engine_memory, check_rollouts, remarks_on_rollouts
from rlhf_core.preflight.services import remarks_on_services
from rlhf_core.preflight.settings import (
    check_adapters,
    check_batches,
    check_data_settings,
    check_lengths,
    check_nodes,
    check_placements,
    check_training,
)
from rlhf_core.store import Store, open_store
from rlhf_core.system.machine import Machine, this_machine

_TOLERANCE = 1.1  # an estimate above the memory by more than this factor is refused


def check(
    config: PipelineConfig,
    *,
    store: Store | None = None,
    machine: Machine | None = None,
    contact: bool = True,
    model: Mapping[str, Any] | None = None,
    remarks: list[str] | None = None,
) -> list[str]:
    """All problems of a pipeline; with an empty list it can start. Takes seconds.

    Args:
        store: default: the store of the configuration.
        machine: default: this machine.
        contact: False checks settings only, without files, store, hub and disk.
        model: config.json of the base model, if it cannot be read from the source.
        remarks: what a person should know, though it is no problem, is added.
    """
    here = isinstance(config.launcher, LocalLauncher)  # else the stages run on other machines
    machine = machine or this_machine()
    problems: list[str] = []
    if contact:
        store, found = _check_store(config, store)
        problems += found
    if config.new_model is None:
        problems += check_model(config.model, store, contact=contact, packages=here)
    problems += _check_imported_models(config, store, contact)
    model = model or _config_of(config, store)
    shape = _shape(model)
    wrong = recipe.problems(config)
    problems += wrong
    if wrong and not config.stages:
        return problems
    problems += check_data_settings(config)
    if contact:
        problems += _check_data_sources(config, store) + _check_tracking(config)
    if contact and here:
        problems += _check_packages(config) + _check_rewards(config) + check_environments(config)
    if contact:
        found, noticed = check_answers(config, store)
        problems += found
        if remarks is not None:
            remarks += noticed + (_remarks(config, machine) if here else [])
    if contact and here:
        problems += _check_judges(config)
    if contact and config.lm_eval is not None:
        problems += _check_lm_eval(config.lm_eval, here)
    if here:
        problems += check_placements(config, machine)
    problems += check_nodes(config) + check_batches(config)
    problems += check_rollouts(config, shape, machine if here else None, packages=contact and here)
    if here:
        problems += check_training(config, shape, machine)
    problems += check_lengths(config, shape)
    problems += check_adapters(config, model)
    if here and model is not None and shape is not None and not problems:
        problems += _check_memory(config, model, machine, store)
        if contact:
            problems += check_disk(config, shape, store)
    return list(dict.fromkeys(problems))


def _remarks(config: PipelineConfig, machine: Machine) -> list[str]:
    return remarks_on_rollouts(config, machine) + remarks_on_services(config)


def dry_run(
    config: PipelineConfig,
    machine: Machine | None = None,
    model: Mapping[str, Any] | None = None,
) -> list[str]:
    """Problems of the settings alone, for any machine.

    Args:
        model: config.json of a hub model; without it, lengths and memory are not checked.
    """
    return check(config, machine=machine, contact=False, model=model)


# --------------------------------------------------------------------------- store, data, packages


def _check_store(config: PipelineConfig, store: Store | None) -> tuple[Store | None, list[str]]:
    try:
        opened = store or open_store(config.store)
        opened.check()
    except RLHFError as error:
        return None, [f"store: {error}"]
    return opened, []


def _check_data_sources(config: PipelineConfig, store: Store | None) -> list[str]:
    from rlhf_core.data.check import check_source

    problems = []
    for purpose, name, settings in recipe.data_sources(config):
        try:
            found = check_source(settings, purpose, store)
        except RLHFError as error:
            found = [str(error)]
        problems += [f"{name}: {text}" for text in found]
    if recipe.produces_model(config) and config.evaluate.questions not in ("builtin", "none"):
        problems += _check_questions(config.evaluate.questions)
    return problems


def _check_questions(source: str) -> list[str]:
    from rlhf_core.data.questions import read_questions

    try:
        read_questions(source)
    except RLHFError as error:
        return [f"evaluate.questions: {error}"]
    return []


def _check_imported_models(config: PipelineConfig, store: Store | None, contact: bool) -> list[str]:
    problems = []
    for source in recipe.imported_rewards(config):
        there = ModelSettings(source=source, trust_remote_code=config.model.trust_remote_code)
        found = check_model(there, store, contact=contact, kind="reward_model")
        problems += [f"reward_model: {text}" for text in found]
    if config.teacher is not None:
        found = check_model(_teacher(config), store, contact=contact)
        problems += [f"teacher: {text}" for text in found]
    return problems


def _teacher(config: PipelineConfig) -> ModelSettings:
    assert config.teacher is not None
    return ModelSettings(source=config.teacher, trust_remote_code=config.model.trust_remote_code)


def _check_rewards(config: PipelineConfig) -> list[str]:
    """Packages, functions and patterns of reward rules."""
    from rlhf_core.rewards import check_rewards

    problems = []
    for stage in config.stages:
        settings = recipe.section(config, stage)
        if not isinstance(settings, recipe.Rewarded) or not settings.rewards:
            continue  # without rewards, a judge compares the replies
        found = check_rewards(settings.rewards, config.data.prompts)
        problems += [f"{stage}.{text}" for text in found]
    return problems


def _check_judges(config: PipelineConfig) -> list[str]:
    """The keys of the judges that evaluate, label and compare replies in training."""
    from rlhf_core.judges.posting import key_from

    problems = []
    for name, judge in recipe.judges(config).items():
        try:
            key_from(judge.key_variable, "The judge")
        except RLHFError as error:
            problems.append(f"{name}: {error}")
    return problems


def _check_lm_eval(settings: LmEvalSettings, here: bool) -> list[str]:
    """The harness and its tasks; for a stage that runs elsewhere only the folder of tasks, which is
    part of the stage key."""
    from rlhf_core.evaluation.harness.tasks import check_tasks, task_folder

    if here:
        return check_tasks(settings)
    try:
        task_folder(settings.include_path)
    except RLHFError as error:
        return [str(error)]
    return []


def _check_tracking(config: PipelineConfig) -> list[str]:
    wanted = {
        "tracking": ("mlflow", config.tracking),
        "openlineage": ("openlineage", config.openlineage),
    }
    return [
        f"{setting} needs the package {package} where the pipeline runs, and it is not installed; "
        f'run: pip install "rlhf-pipeline[{package}]", or clear {setting}'
        for setting, (package, settings) in wanted.items()
        if settings is not None and find_spec(package) is None
    ]


def _check_packages(config: PipelineConfig) -> list[str]:
    needed = {"gguf": config.model.source.startswith("builtin:")}
    labels = (step for step in recipe.steps(config) if step.algorithm == "label")
    judges = {recipe.label_settings(config, step)[1].labeller for step in labels}
    for judge, package in PACKAGES.items():
        needed[package] = judge in judges | {config.evaluate.judge}
    needed["peft"] = any(recipe.section(config, stage).lora for stage in config.stages)
    needed["bitsandbytes"] = config.model.quantization is not None
    return [
        f"the package {name} is not installed, and the settings need it; run: pip install {name}"
        for name, used in needed.items()
        if used and find_spec(name) is None
    ]


def _config_of(config: PipelineConfig, store: Store | None) -> dict[str, Any] | None:
    if config.new_model is not None:
        new = config.new_model
        sizes = {"model_type": new.architecture, "vocab_size": new.vocabulary}
        return sizes | new_model_sizes(new)
    try:
        return model_config(config.model, store)
    except RLHFError:
        return None  # reported by check_model


def _config_of_teacher(config: PipelineConfig, store: Store | None) -> dict[str, Any] | None:
    try:
        return None if config.teacher is None else model_config(_teacher(config), store)
    except RLHFError:
        return None  # reported by check_model


def _shape(config: Mapping[str, Any] | None) -> ModelShape | None:
    try:
        return None if config is None else read_shape(config)
    except (KeyError, TypeError, ValueError):
        return None  # an architecture with other field names: its sizes are not checked


# --------------------------------------------------------------------------- size


def _check_memory(
    config: PipelineConfig, model: Mapping[str, Any], machine: Machine, store: Store | None
) -> list[str]:
    problems = []
    more: dict[str, Any] = {
        "quantization": config.model.quantization,
        "reward_models": recipe.reward_models(config),
        "teacher": _config_of_teacher(config, store),
    }
    for stage, settings, resources, length in trained_stages(config):
        device = device_of(resources, machine)
        place = f"a GPU of {machine.gpu_memory / GIB:.0f} GiB"
        available = machine.gpu_memory
        found = estimate_memory(
            model, settings, resources, stage, max_length=length, device=device,
            **more,
        )  # fmt: skip
        if device == "cpu":
            left = max(resources.ranks, machine.ram - found.samplers) if machine.ram else 0
            available = left // resources.ranks
            place = f"{available / GIB:.1f} GiB ({machine.ram / GIB:.1f} GiB of main memory for "
            place += f"{resources.ranks} rank{'s' if resources.ranks > 1 else ''}"
            place += f" and {found.samplers / GIB:.1f} GiB of samplers)" if found.samplers else ")"
        if available and found.total > _TOLERANCE * available:
            ways = ways_to_fit(
                model, settings, resources, stage, available, max_length=length, device=device,
                **more,
            )  # fmt: skip
            advice = "; or ".join(ways) or (
                "a smaller model, or more ranks with fsdp2"
                if device == "cuda"
                else "a smaller model, or fewer ranks"
            )
            problems.append(
                f"{stage} with strategy {resources.strategy} needs about {found}, but each rank "
                f"has {place}; expected to fit: {advice}"
            )
        problems += check_engine_memory(stage, settings, resources, found, machine)
        host = found.host * min(resources.ranks, max(1, machine.gpus)) + found.host_once
        host += found.samplers
        if device == "cuda" and machine.ram and host > _TOLERANCE * machine.ram:
            problems.append(
                f"{stage} needs about {host / GIB:.0f} GiB of main memory for its ranks "
                f"({found.host / GIB:.0f} GiB each), but this machine has "
                f"{machine.ram / GIB:.0f} GiB; use fewer ranks, LoRA or trainable_layers"
            )
    return problems
