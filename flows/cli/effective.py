"""The settings of a run as it will use them: preset, file and options, over the defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import yaml

from rlhf_core.jobs import PipelineConfig, TrainingStage

MARK = "# default:"
COLUMN = 44  # of the mark, where the setting leaves room


def effective(config: PipelineConfig) -> Iterator[str]:
    """Lines of YAML: all settings, without the sections of stages that do not run. What differs
    from the defaults is marked with them."""
    unused = set(get_args(TrainingStage)) - set(config.stages)
    shown = config.model_dump(mode="json", exclude=unused)
    yield from _lines(shown, PipelineConfig().model_dump(mode="json"), 0)


def _lines(section: Mapping[str, Any], defaults: Any, depth: int) -> Iterator[str]:
    for key, value in section.items():
        start = f"{'  ' * depth}{key}:"
        known = isinstance(defaults, Mapping) and key in defaults
        default = defaults[key] if known else None
        if isinstance(value, Mapping) and value:
            replaced = known and not isinstance(default, Mapping)
            yield _marked(start, default) if replaced else start
            yield from _lines(value, default if isinstance(default, Mapping) else None, depth + 1)
            continue
        line = f"{start} {_flow(value)}"
        yield _marked(line, default) if known and value != default else line


def _marked(line: str, default: Any) -> str:
    return f"{line:<{COLUMN}}  {MARK} {_flow(default)}"


def _flow(value: Any) -> str:
    """A value in one line."""
    text = yaml.safe_dump(
        value, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False
    )
    return text.strip().removesuffix("\n...").strip()
