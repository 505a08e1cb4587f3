"""Settings and numbers as flat mappings, and where several of them differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.jobs import PipelineConfig


def flat(value: Mapping[str, Any]) -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    found: dict[str, Any] = {}
    for key, part in value.items():
        if isinstance(part, Mapping) and part:
            found |= {f"{key}.{inner}": each for inner, each in flat(part).items()}
        else:
            found[str(key)] = part
    return found


def numbers(value: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a nested mapping, with dotted keys."""
    return {
        key: float(part)
        for key, part in flat(value).items()
        if isinstance(part, int | float) and not isinstance(part, bool)
    }


def side_by_side(sides: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Name -> its value on each side, None where a side has none; in the order of the first."""
    names = dict.fromkeys(name for side in sides for name in side)
    return {name: [side.get(name) for side in sides] for name in names}


def unequal(sides: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """As `side_by_side`, of the names whose values differ."""
    return {
        name: values
        for name, values in side_by_side(sides).items()
        if any(value != values[0] for value in values)
    }


def changed(config: PipelineConfig) -> dict[str, Any]:
    """The settings of a run that differ from the defaults."""
    pairs = unequal([flat(c.model_dump(mode="json")) for c in (PipelineConfig(), config)])
    return {name: value for name, (default, value) in pairs.items() if value is not None}
