"""Settings, made from the classes that describe them: sound values, and awkward ones in places."""

from __future__ import annotations

import functools
import math
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf_core.jobs import PipelineConfig
from tests.fuzz.values import anything, numbers, scalars, texts

slugs = st.text("abcXYZ019._-", min_size=1, max_size=9)


def sound(kind: Any, field: FieldInfo | None = None) -> st.SearchStrategy[Any]:
    """Values of a type, mostly within the bounds that the field sets."""
    origin = get_origin(kind)
    if origin is Annotated:
        return sound(get_args(kind)[0], field)
    if origin is Literal:
        return st.sampled_from(get_args(kind))
    if origin in (Union, UnionType):
        return st.one_of([sound(part, field) for part in get_args(kind)])
    if kind is NoneType:
        return st.none()
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return settings_of(kind)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(1, 64) | st.sampled_from([0, 30, 2**31 - 1, 2**31, 10**12, 10**30])
    if kind is float:
        return st.floats(0.001, 1.0) | st.sampled_from([0, 1, 1e-300, 1e300, math.inf, math.nan])
    if kind is str:
        return st.one_of(slugs, slugs, texts, st.just("0" * 64))
    if origin is dict:
        return st.dictionaries(slugs, slugs, max_size=2)
    assert origin is tuple, kind
    return st.lists(sound(get_args(kind)[0]), max_size=3)


@functools.cache  # else it is made anew for every case, which takes longer than the case
def settings_of(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    """A few of a section's settings; all that have no default."""
    optional, needed = {}, {}
    for name, field in model.model_fields.items():
        values = sound(field.annotation, field)
        (needed if field.is_required() else optional)[name] = values
    if not optional:  # there is nothing to choose, and `sampled_from` takes no empty list
        return st.fixed_dictionaries(needed)
    names = st.lists(st.sampled_from(sorted(optional)), max_size=4, unique=True)
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries({**needed, **{n: optional[n] for n in chosen}})
    )


@st.composite
def spoilt(draw: st.DrawFn, value: Any) -> Any:
    """A setting replaced, added or renamed somewhere."""
    if not isinstance(value, dict) or not value or draw(st.integers(0, 3)) == 0:
        return draw(st.one_of(numbers, scalars, anything))
    key = draw(st.sampled_from(sorted(value, key=str)))
    kind = draw(st.sampled_from(["inside", "inside", "inside", "add", "rename", "odd key"]))
    result = dict(value)
    if kind == "inside":
        result[key] = draw(spoilt(value[key]))
    elif kind == "add":
        result[draw(texts)] = draw(anything)
    elif kind == "rename":
        result[f"{key}s"] = result.pop(key)
    else:
        result[draw(st.sampled_from([None, 3, True, 1.5]))] = draw(anything)
    return result


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    value: dict[str, Any] = draw(settings_of(PipelineConfig))
    value.pop("preset", None)
    if draw(st.booleans()):
        spoiled = draw(spoilt(value))
        value = spoiled if isinstance(spoiled, dict) else value
    return value


def paths(model: type[BaseModel] = PipelineConfig, prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        found.append(prefix + name)
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found += paths(part, f"{prefix}{name}.")
    return found


SETTING_PATHS = sorted(set(paths()))
YAML_VALUES = [
    "2001-99-99", "!!int x", "!!float x", "!!timestamp x", "!!map [1]", "!!map x", "!!set x",
    "!!omap [1]", "!!pairs x", "!!seq x", "!!binary é", "!!python/object/apply:os.system [id]",
    "!!str [1]", "!!bool x", "!!null x", "&a [*a]", "{<<: 1}", "{<<: [1]}", "{? [1] : 2}",
    "{a: 1, a: 2}",
    "*nobody", "%TAG", "0b_", "0x_", "1:99:99", "9" * 5000, ".nan", ".inf", "-.inf", "1e400", "'",
    "[" * 2000, "{a: " * 500, "\t", "@", "`", "\x00", "\ud800", "\x85", "---\n---", "{", "]",
    "0x" + "f" * 9000,
    "2001-01-01", "12:30:45", "0o17", "017", "~", "yes", "=", "<<", "!x y", "? ", "- - -",
]  # fmt: skip
yaml_values = st.one_of(
    st.sampled_from(YAML_VALUES),
    scalars.map(str),
    st.text("[]{}:,-&*!|>'\"%@`#? \nab01", max_size=20),
)
