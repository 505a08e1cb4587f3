"""Weight files and model folders: problems in words, and the same verdict as the library's own."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import strategies as st

from rlhf_core.jobs import ModelSettings
from rlhf_core.model_files.safetensors_header import HeaderProblem, read_header
from rlhf_core.model_files.shape import read_shape
from rlhf_core.model_files.source_check import check_model, model_config
from tests.fuzz.cases import try_cases
from tests.fuzz.values import anything, damaged, texts
from tests.rlhf_core.tiny_models import copy_of

pytestmark = pytest.mark.slow

WIDTHS = {"F32": 4, "BF16": 2, "I64": 8, "BOOL": 1, "F8_E4M3": 1}


@st.composite
def weight_files(draw: st.DrawFn) -> bytes:
    """A safetensors file; often with a field of its header, or bytes anywhere, changed."""
    header: dict[str, Any] = {}
    at = 0
    for number in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(sorted(WIDTHS)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = WIDTHS[kind]
        for side in shape:
            size *= side
        header[f"t{number}"] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    data = bytes(at)
    spoil = draw(st.sampled_from(["none", "field", "field", "field", "name", "offset", "top"]))
    if header and spoil == "field":
        tensor = header[draw(st.sampled_from(sorted(header)))]
        name = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        values = {
            "dtype": st.sampled_from(["F4", "f32", "C64", "", "F8_E8M0", "F16"]),
            "shape": st.lists(st.integers(-2, 2**65), max_size=3),
            "data_offsets": st.lists(st.integers(-4, 40) | st.floats(0, 9), max_size=3),
            "more": anything,
        }
        tensor[name] = draw(st.one_of(values[name], values[name], anything))
    elif header and spoil == "offset":  # a hole, or two tensors in one place
        tensor = header[draw(st.sampled_from(sorted(header)))]
        tensor["data_offsets"] = [n + draw(st.integers(-2, 2)) for n in tensor["data_offsets"]]
    elif spoil == "name":
        header[draw(texts)] = draw(anything)
    elif spoil == "top":
        header["__metadata__"] = draw(anything | st.just({"format": "pt"}))
    text = json.dumps(header).encode()
    text += b" " * draw(st.sampled_from([0, 0, 3]))
    file = len(text).to_bytes(8, "little") + text + data
    return draw(damaged(file)) if draw(st.integers(0, 3)) == 0 else file


def test_a_weight_file_gets_the_librarys_own_verdict(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            theirs = dict(safetensors.deserialize(content))
        except safetensors.SafetensorError as error:
            theirs, problem = None, error
        try:
            ours = read_header(path)
        except HeaderProblem as error:
            assert str(path) in str(error) and len(str(error)) < 1000
            assert theirs is None, f"the library reads it, here it is refused: {error}"
            return
        assert theirs is not None, f"the library refuses it ({problem}), here it is accepted"
        assert {n: (t.dtype, list(t.shape)) for n, t in ours.items()} == {
            n: (t["dtype"], t["shape"]) for n, t in theirs.items()
        }

    try_cases("weight headers", weight_files(), check)


def test_a_model_folder_is_sound_or_has_problems(tmp_path: Path) -> None:
    sound = copy_of("llama", tmp_path / "sound")
    names = sorted(path.name for path in sound.iterdir() if path.suffix in (".json", ".jinja"))
    folder = tmp_path / "model"

    @st.composite
    def spoilt_folders(draw: st.DrawFn) -> tuple[str, bytes]:
        name = draw(st.sampled_from([*names, "config.json", "model.safetensors.index.json"]))
        text = (sound / name).read_bytes() if name in names else b'{"weight_map": {"a": "b"}}'
        if name.endswith(".jinja") or draw(st.integers(0, 3)) == 0:
            return name, draw(damaged(text))
        value: Any = json.loads(text)
        parts = [value]
        for _ in range(draw(st.integers(0, 2))):  # somewhere inside
            inner = parts[-1]
            below = [v for v in inner.values() if isinstance(v, dict) and v]
            if below:
                parts.append(draw(st.sampled_from(below)))
        key = draw(st.sampled_from(sorted(parts[-1])[:200]))
        if draw(st.booleans()):
            parts[-1][key] = draw(anything)
        else:
            del parts[-1][key]
        whole = draw(anything) if draw(st.integers(0, 9)) == 0 else value
        return name, json.dumps(whole).encode()

    def check(case: tuple[str, bytes]) -> None:
        name, content = case
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        (folder / name).write_bytes(content)
        settings = ModelSettings(source=str(folder))
        for problem in check_model(settings):
            assert str(folder) in problem or "chat template" in problem.lower(), problem
            assert len(problem) < 2000
            problem.encode("utf-8", "backslashreplace")
        config = model_config(settings)
        if config is not None:
            with contextlib.suppress(KeyError, TypeError, ValueError):  # as preflight takes them
                read_shape(config)

    try_cases("model folders", spoilt_folders(), check)
