"""Problems of sections that have variants: about the variant that the input is, never none."""

import types
from typing import get_args, get_origin

import pytest
from pydantic import BaseModel

from rlhf_core.errors import PreflightError
from rlhf_core.jobs import GRPOSettings, PipelineConfig
from rlhf_core.pipeline.explain import OTHER_NAMES
from rlhf_core.pipeline.presets import build_config


def problems(settings, overrides=()):
    with pytest.raises(PreflightError) as caught:
        build_config(settings, list(overrides))
    return caught.value.problems


def kinds(annotation):
    """The sections that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in kinds(part)]


def listed(annotation):
    return get_origin(annotation) is tuple or any(
        listed(part) for part in get_args(annotation) if isinstance(part, types.GenericAlias)
    )


def sections(model=PipelineConfig, path=(), seen=None):
    """Each section and variant once: its path, and the settings that tell it from its siblings."""
    seen = set() if seen is None else seen
    for name, field in model.model_fields.items():
        for kind in kinds(field.annotation):
            if kind in seen:
                continue
            seen.add(kind)
            tags = {
                tag: kind.model_fields[tag].default
                for tag in ("type", "source")
                if tag in kind.model_fields
                and len(get_args(kind.model_fields[tag].annotation)) == 1
            }
            tags |= {"mix": []} if "mix" in kind.model_fields else {}
            here = (*path, (name, tags, listed(field.annotation)))
            yield kind, here
            yield from sections(kind, here, seen)


@pytest.mark.parametrize(
    ("kind", "path"), sections(), ids=lambda value: getattr(value, "__name__", "")
)
def test_unknown_setting_is_explained_in_each_section(kind, path):
    value = {"zzz": 1}
    for name, tags, is_list in reversed(path):
        value = tags | value
        value = {name: [value] if is_list else value}
    expected = ".".join(f"{name}.0" if is_list else name for name, _, is_list in path)
    assert any(said.startswith(f"{expected}.zzz is not a setting") for said in problems(value))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("reinforce_pp.environment.functions=1:99:99",
         "reinforce_pp.environment.functions: found '1:99:99', expected a list."),
        ("grpo.environment={type: tools, functions: [1]}",
         "grpo.environment.functions.0: found 1, expected string."),
        ("grpo.environment={type: tools}",
         "grpo.environment: the environment tools has neither functions nor servers, so there is "
         "nothing to call; give one of them, or take the environment calculator"),
        ("data.preference.ax_prompts=1",
         "data.preference.ax_prompts is not a setting; did you mean data.preference.max_prompts?"),
        ("grpo.rewards=[{type: http, url: 'http://x/score', key_variable: sk-abc123}]",
         "grpo.rewards.0.key_variable: expected the name of an environment variable, such as "
         "OPENAI_API_KEY, never the key itself; what stands there is not shown."),
        ("grpo.max_staleness=1",  # not grpo.max_length, which is only written alike
         "grpo.max_staleness is not a setting; did you mean grpo.rollout.max_staleness?"),
        ("grpo.max_completion_length=64",  # TRL's name
         "grpo.max_completion_length is not a setting; did you mean grpo.max_new_tokens?"),
        ("grpo.clip_ratio_c=3",  # verl's name
         "grpo.clip_ratio_c is not a setting; did you mean grpo.dual_clip?"),
        ("grpo.use_vllm=true",
         "grpo.use_vllm is not a setting; did you mean grpo.rollout.type?"),
    ],
)  # fmt: skip
def test_variant_with_a_check_of_its_own_is_explained(override, said):
    assert problems("smoke", [override]) == [said]


def test_names_of_other_libraries_stand_for_settings_of_grpo():
    for name, own in OTHER_NAMES.items():
        found = GRPOSettings.model_fields.keys() | {"rollout.type", "rollout.correction"}
        assert own in found and name not in GRPOSettings.model_fields
