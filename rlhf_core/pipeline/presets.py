"""Builds a PipelineConfig from a preset or file and `key=value` overrides. Does not import torch.

A preset is a YAML file with the settings that differ from the defaults of `PipelineConfig`.
"""

from __future__ import annotations

import copy
import difflib
import os
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from rlhf_core.errors import ConfigError, PreflightError
from rlhf_core.jobs import PipelineConfig, TrainingStage
from rlhf_core.jobs.base import RenamedSetting
from rlhf_core.pipeline.explain import explain, shorten
from rlhf_core.pipeline.preset_files import preset_names, preset_text

# Sections whose `resources` override the top-level `resources`.
STAGE_SECTIONS = (
    *((stage,) for stage in get_args(TrainingStage)),
    ("evaluate",), ("lm_eval",), ("data", "preference"), ("data", "rounds"),
)  # fmt: skip


def load_preset(name_or_path: str | Path) -> dict[str, Any]:
    """The mapping in a preset (by name) or in a YAML or JSON file (by path).

    Raises:
        ConfigError: there is no such preset or file, or it is not YAML with a mapping at its top.
    """
    text = str(name_or_path)
    names = preset_names()
    if text in names:
        return parse_settings(preset_text(text), f"preset {text}")
    looks_like_a_path = "/" in text or text.endswith((".yaml", ".yml", ".json"))
    if not looks_like_a_path and not os.path.isfile(text):
        close = difflib.get_close_matches(text, names, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"There is no preset {shorten(text)}.{hint} Presets: {', '.join(names)}; "
            "to use a file, give its path, such as ./my-run.yaml."
        )
    try:
        path = Path(text).expanduser()
        return parse_settings(path.read_text("utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"Cannot read {text[:300]}: {error.strerror}.") from error
    except RuntimeError as error:
        raise ConfigError(f"Cannot read {text[:300]}: {error}") from error
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise ConfigError(f"{path} is not a text file in UTF-8 ({found}).") from error
    except ConfigError:
        raise
    except ValueError as error:  # a NUL in the path
        raise ConfigError(f"Cannot read {text[:300]!r}: {error}.") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, of which YAML would silently use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} was already set in line {seen[key]}", key_node.start_mark
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    """Parse a YAML text.

    Raises:
        yaml.YAMLError: also for texts on which PyYAML raises other errors, such as 2001-99-99.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("lists or sections are nested too deeply to be read") from None
    except Exception as error:
        raise yaml.YAMLError(f"a value does not have the form of its type: {error}") from error


def parse_settings(text: str, where: str) -> dict[str, Any]:
    """The mapping in a YAML text; {} in an empty one.

    Args:
        where: it comes from, for messages.

    Raises:
        ConfigError: it is not YAML with a mapping at its top.
    """
    try:
        value = _read_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where} holds a {type(value).__name__}; expected sections such as `sft:`, `ppo:`."
        )
    return value


def apply_overrides(settings: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the settings with `a.b.c=value` applied in order; values are YAML.

    Raises:
        ConfigError: an override is not `key=value`, its value is not YAML, or its path leads
            through something that is not a section.
    """
    result = copy.deepcopy(dict(settings))
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(
                f"--set {shorten(override)} is not a setting; expected key=value, such as "
                "ppo.kl_coef=0.1."
            )
        try:
            value = _read_yaml(text)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or shorten(str(error), 200, bare=True)
            raise ConfigError(
                f"--set {shorten(override)}: the value {shorten(text)} is not YAML ({problem}); "
                "put quotes around a text with special characters."
            ) from error
        _put(result, keys, value, override)
    return result


def _put(settings: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    section = settings
    for depth, key in enumerate(keys[:-1], 1):
        inner = section.get(key)
        if inner is None:
            inner = section[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"--set {shorten(override)}: {'.'.join(keys[:depth])} is a value "
                f"({shorten(inner)}), not a section."
            )
        section = inner
    section[keys[-1]] = value


def merge_resources(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which a stage's partial `resources` are merged over the top-level ones."""
    result = copy.deepcopy(dict(settings))
    common = result.get("resources")
    for path in STAGE_SECTIONS:
        section: Any = result
        for key in path:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(common, dict):
            own = section.get("resources")
            if isinstance(own, dict):
                section["resources"] = {**common, **own}
    return result


def build_config(
    preset: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> PipelineConfig:
    """The configuration that a preset (name, file or mapping) and overrides describe.

    Raises:
        ConfigError: the preset or an override cannot be read.
        PreflightError: settings are unknown or out of range; all of them in one list.
    """
    settings = dict(preset) if isinstance(preset, Mapping) else load_preset(preset)
    settings = apply_overrides(settings, overrides)
    seen: list[str] = []
    while (base := settings.pop("preset", "none")) != "none":
        if base in seen:
            raise ConfigError(
                f"preset {shorten(base)} is based on itself; name another preset in it."
            )
        seen.append(base)
        settings = _merge(load_preset(str(base)), settings)
    settings = merge_resources(settings)
    try:
        return PipelineConfig.model_validate(settings)
    except ValidationError as error:
        raise PreflightError(explain(error, PipelineConfig, settings)) from error


def build_noting(
    preset: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[PipelineConfig, list[str]]:
    """`build_config`, and a sentence about each setting that was given by its old name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RenamedSetting)
        config = build_config(preset, overrides)
    return config, list(dict.fromkeys(f"{w.message}." for w in caught))


def _replaces(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a section takes the place of another: a mixture that of a single data set, and the
    other way round."""
    return ("mix" in new and "mix" not in old) or ("mix" in old and "source" in new)


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(base))
    for key, value in overrides.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and not _replaces(old, value):
            value = _merge(old, value)
        result[key] = value
    return result
