"""Messages for invalid settings: the value found, what is needed, the closest name."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlhf_core.jobs import PipelineConfig

# Names of TRL's GRPOConfig and of verl -> the setting of an online stage that does the same.
OTHER_NAMES = {
    "num_generations": "group_size",
    "max_completion_length": "max_new_tokens",
    "max_response_length": "max_new_tokens",
    "epsilon": "clip_range",
    "clip_ratio": "clip_range",
    "clip_ratio_low": "clip_range",
    "epsilon_high": "clip_range_high",
    "clip_ratio_high": "clip_range_high",
    "delta": "dual_clip",
    "clip_ratio_c": "dual_clip",
    "beta": "kl_coef",
    "kl_loss_coef": "kl_coef",
    "kl_loss_type": "kl_estimator",
    "use_kl_in_reward": "kl_in",
    "loss_type": "average",
    "loss_agg_mode": "average",
    "importance_sampling_level": "objective",
    "num_iterations": "epochs",
    "steps_per_generation": "minibatches",
    "ppo_mini_batch_size": "minibatches",
    "train_batch_size": "batch_size",
    "filter_groups": "max_resamples",
    "norm_adv_by_std_in_grpo": "scale_rewards",
    "reward_funcs": "rewards",
    "use_vllm": "rollout.type",
    "vllm_importance_sampling_correction": "rollout.correction",
}


def explain(error: ValidationError, model: type[BaseModel], value: Any) -> list[str]:
    """One text per problem: path of the setting, value found, what is needed.

    Args:
        error: what validating `value` as `model` raised.
    """
    problems: dict[str, None] = {}
    for item in error.errors():
        if (text := _explain_one(item, model, value)) is not None:
            problems[text] = None
    return list(problems)


def _explain_one(item: ErrorDetails, model: type[BaseModel], value: Any) -> str | None:
    """The text of one error; None if it is about a variant of a union that the input is not."""
    names: list[str] = []
    here: type[BaseModel] | None = model
    parts = list(item["loc"])
    last = str(parts[-1]) if parts else ""
    variants: list[type[BaseModel]] = []
    tags: list[str] = []
    for part in parts:
        if isinstance(part, int):  # index of a list, whose items are of the field's variants
            names.append(str(part))
            inside = isinstance(value, list | tuple) and part < len(value)
            value = value[part] if inside else None
            continue
        if variants and (chosen := _variant(variants, value)) and len(variants) > 1:
            tags = _tags(variants)
            variants = []
            if _class_name(part) != chosen.__name__:
                return None
            here = chosen
            continue
        names.append(shorten(str(part), bare=True))
        value = value.get(part) if isinstance(value, Mapping) else None
        field = here.model_fields.get(str(part)) if here else None
        variants = _models(field.annotation) if field else []
        if not (here and item["type"] == "extra_forbidden" and part == parts[-1]):
            here = variants[0] if variants else None
    path = ".".join(names) or "the configuration"
    kind, message = item["type"], item["msg"]
    if kind == "extra_forbidden":
        return _unknown(names, last, here)
    if kind == "value_error":
        return f"{path}: {message.removeprefix('Value error, ')}"
    if kind == "missing":
        return f"{path} is missing."
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "a section with settings"
    if kind == "tuple_type":
        message = "a list"
    if kind == "literal_error" and last == "type" and tags:
        message = f"one of {', '.join(tags)}"
    if last == "key_variable":  # a key that was put there must not reach a log or a run's state
        return (
            f"{path}: expected the name of an environment variable, such as OPENAI_API_KEY, never "
            "the key itself; what stands there is not shown."
        )
    if kind == "string_pattern_mismatch":
        message = f"a text like {message.rpartition(' pattern ')[2]}"
    needed = message.removeprefix("Input should be ").removeprefix("a valid ").split(", unable")[0]
    return f"{path}: found {shorten(item['input'])}, expected {needed}."


def _unknown(names: list[str], last: str, section: type[BaseModel] | None) -> str:
    valid = list(section.model_fields) if section else []
    valid += ["preset"] if section is PipelineConfig else []
    here = ".".join([*names[:-1], ""])
    paths = _paths(PipelineConfig)
    if (own := OTHER_NAMES.get(last)) and own.partition(".")[0] in valid:
        return f"{'.'.join(names)} is not a setting; did you mean {here}{own}?"
    elsewhere = [p for p in paths if p.rsplit(".", 1)[-1] == last]
    inside = [p for p in elsewhere if p.startswith(here)]
    if here and inside and ".".join(names) not in paths:
        return f"{'.'.join(names)} is not a setting; did you mean {inside[0]}?"
    close = difflib.get_close_matches(last, valid, 1, 0.6)
    close = close or [name for name in valid if last and (last in name or name in last)][:1]
    if ".".join(names) in paths:  # a setting of another variant
        parent = ".".join(names[:-1])
        return (
            f"{'.'.join(names)} is not a setting for this {parent}.source; leave it out, or "
            f"replace the whole section on the command line: --set '{parent}={{source: ...}}'."
        )
    if not close:  # the right name in the wrong section
        if elsewhere:
            return f"{'.'.join(names)} is not a setting; did you mean {elsewhere[0]}?"
        where, has = ".".join(names[:-1]) or "the top level", ", ".join(sorted(valid))
        return f"{'.'.join(names)} is not a setting; {where} has: {has}."
    return f"{'.'.join(names)} is not a setting; did you mean {'.'.join([*names[:-1], close[0]])}?"


def _models(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) in (Union, UnionType, tuple):
        return [m for part in get_args(annotation) for m in _models(part)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return []


def _class_name(label: str) -> str:
    """The class in pydantic's label of a variant: `function-after[_check(), Variant]` where a model
    validator is around it, else its name."""
    return label.rstrip("]").rpartition(", ")[2]


def _variant(variants: list[type[BaseModel]], value: Any) -> type[BaseModel]:
    """The variant of the input: by its `source` or `type`, else by the settings that it has."""
    if isinstance(value, Mapping):
        if "mix" in value and (several := [m for m in variants if "mix" in m.model_fields]):
            return several[0]
        for tag in ("type", "source"):
            for model in variants:
                field = model.model_fields.get(tag)
                if field and tag in value and get_args(field.annotation) == (value[tag],):
                    return model
        literal = [m for m in variants if _tagged(m, value)]
        rest = [m for m in variants if m not in literal] or variants
        return max(rest, key=lambda m: len(set(value) & set(m.model_fields)))
    return variants[0]


def _tags(variants: list[type[BaseModel]]) -> list[str]:
    """The `type` of each variant that has one."""
    fields = [model.model_fields.get("type") for model in variants]
    return [str(get_args(field.annotation)[0]) for field in fields if field is not None]


def _tagged(model: type[BaseModel], value: Mapping[str, Any]) -> bool:
    """True when the model has a literal tag that the value contradicts."""
    return any(
        tag in value and len(get_args(field.annotation)) == 1 and value[tag] != field.default
        for tag in ("type", "source")
        if (field := model.model_fields.get(tag))
    )


def _paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, field in model.model_fields.items():
        found.append(prefix + name)
        for inner in _models(field.annotation):
            found += _paths(inner, f"{prefix}{name}.")
    return found


def shorten(value: Any, longest: int = 60, *, bare: bool = False) -> str:
    """A printable value for a message, cut to `longest` characters."""
    if isinstance(value, str):
        text = value[: 2 * longest] if bare else repr(value[: 2 * longest])
    else:
        try:
            text = _REPR.repr(value)  # bounded: a YAML alias can stand for a billion values
        except ValueError:  # an integer of thousands of digits
            text = f"a very large {type(value).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= longest else text[: longest - 3] + "..."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 60
