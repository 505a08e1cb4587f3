"""Checks a model folder without loading the model. Imports no torch.

Each problem is a text that says what was found, what was expected and what to do.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_core.errors import ModelError
from rlhf_core.model_files.config_check import check_config
from rlhf_core.model_files.expected_keys import compare_keys
from rlhf_core.model_files.safetensors_header import HeaderProblem, TensorInfo, read_header
from rlhf_core.system.git_lfs import LFS_MAGIC

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
REWARD_HEAD = "reward_head.safetensors"  # beside the backbone of this project's reward models
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")

CONVERT = (
    'python -c "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;'
    " a, b = sys.argv[1:]; M.from_pretrained(a, use_safetensors=False).save_pretrained(b);"
    ' T.from_pretrained(a).save_pretrained(b)" {source} {target}'
)


def check_weight_files(folder: Path, *, is_language_model: bool = True) -> list[str]:
    """Problems of a Hugging Face model folder that are visible without loading it.

    Finds git-lfs pointers, truncated or damaged safetensors, missing shards, weights that exist
    only as pickles, a missing config or tokenizer, a vocabulary that does not fit the embedding,
    and a missing end-of-sequence token. It reads only headers and JSON, which takes milliseconds.

    Args:
        is_language_model: False for a reward model, whose keys are checked when it is loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder} is not a folder; expected one with config.json, weights and tokenizer"]
    problems = _lfs_pointers(folder)
    if problems:
        return problems  # the other checks would only report consequences
    config = _json(folder / "config.json", problems)
    if config is None and not (folder / "config.json").exists():
        problems.append(
            f"{folder} has no config.json; expected a Hugging Face model folder: copy the file "
            "from the source of the weights"
        )
    problems += check_config(folder, config) if config is not None and is_language_model else []
    before = len(problems)
    tensors = _tensors(folder, problems)
    if config is not None and is_language_model and len(problems) == before:
        problems += _key_problems(*compare_keys(config, tensors), f"the weights in {folder}")
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        problems.append(
            f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES[:2])}); copy the tokenizer "
            "files from the source of the model into it"
        )
    _check_vocabulary(folder, config or {}, tensors, problems)
    if config is not None and is_language_model and not _has_eos(folder, config):
        problems.append(
            f"{folder} names no end-of-sequence token, so a reply would never end; add "
            '"eos_token" to tokenizer_config.json or "eos_token_id" to generation_config.json'
        )
    return problems


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Dtype, shape and bytes of every tensor of a model folder, by name.

    Raises:
        ModelError: weights are missing, truncated or not safetensors.
    """
    problems = _lfs_pointers(folder)
    tensors = _tensors(folder, problems) if not problems else {}
    if problems:
        raise ModelError("; ".join(problems))
    return tensors


def check_loaded(loading_info: Mapping[str, Any], source: str = "the weights") -> None:
    """Check the report of `from_pretrained(..., output_loading_info=True)`.

    Args:
        source: names the weights in the error.

    Raises:
        ModelError: parameters kept their random initialisation, tensors were unused, or shapes
            differ.
    """
    problems = _key_problems(
        loading_info.get("missing_keys"), loading_info.get("unexpected_keys"), source,
        {
            "tensors of another shape": loading_info.get("mismatched_keys"),
            "errors": loading_info.get("error_msgs"),
        },
    )  # fmt: skip
    if problems:
        raise ModelError(problems[0])


def _key_problems(
    missing: Iterable[object] | None,
    unexpected: Iterable[object] | None,
    source: str,
    more: Mapping[str, Iterable[object] | None] | None = None,
) -> list[str]:
    """One text about all keys that do not fit; no text if all fit."""
    found = {
        "parameters that have no tensor": missing,
        "tensors that match no parameter": unexpected,
        **(more or {}),
    }
    parts = []
    for what, keys in found.items():
        names = sorted(str(key) for key in keys or ())
        if names:
            parts.append(f"{len(names)} {what} ({_first_names(names)})")
    if not parts:
        return []
    return [
        f"{source} do not fit the architecture in config.json: {'; '.join(parts)}. Expected one "
        "tensor for each parameter: check that config.json and weights belong together and that "
        "the model is a causal language model"
    ]


def _first_names(names: list[str]) -> str:
    """The first five names, each cut to 200 characters."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name[:200] for name in names[:5]) + more


def _lfs_pointers(folder: Path) -> list[str]:
    """One problem for each git-lfs pointer in the folder."""
    problems = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024:
            text = path.read_bytes()
            if text.startswith(LFS_MAGIC):
                pull = f"git -C {shlex.quote(str(folder))} lfs pull"
                size = re.search(rb"^size (\d+)$", text, re.MULTILINE)
                wanted = f" of {int(size[1]):,} bytes" if size else ""
                problems.append(
                    f"{path} is a git-lfs pointer ({len(text)} bytes); expected the file{wanted} "
                    f"that it points to: run `git lfs install && {pull}`"
                )
    return problems


def _json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """A JSON object; None if the file is missing, or damaged (which adds a problem)."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} instead of an object")
        return value
    except (ValueError, OSError, RecursionError) as error:
        problems.append(f"{path} is not readable JSON ({error}); expected an intact copy of it")
        return None


def _tensors(folder: Path, problems: list[str]) -> dict[str, TensorInfo]:
    """The tensors of all weight files; missing and damaged files add problems."""
    index_path = folder / "model.safetensors.index.json"
    index = _json(index_path, problems)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if index is not None:
        weight_map = index.get("weight_map") or {}
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            problems.append(
                f"{index_path} has no weight_map from tensors to file names; download it again"
            )
            return {}
        wanted = sorted(set(weight_map.values()))
        missing = [name for name in wanted if name not in names]
        if missing:
            problems.append(
                f"{index_path} names {len(wanted)} weight files, {len(missing)} of which are "
                f"missing: {_first_names(missing)}; download them again"
            )
        names = [name for name in wanted if name in names]
    elif not names and not index_path.exists():
        problems.append(_no_weights(folder))
    elif "model.safetensors" in names:
        names = ["model.safetensors"]
    elif names:
        problems.append(
            f"{folder} holds {', '.join(names[:5])} but neither model.safetensors nor "
            "model.safetensors.index.json; the index maps tensors to files: download it too"
        )
    tensors: dict[str, TensorInfo] = {}
    damaged = False
    for name in names:
        try:
            tensors.update(read_header(folder / name))
        except HeaderProblem as error:
            damaged = True
            problems.append(str(error))
    if index is not None and not damaged and not missing:
        lost = sorted(set(weight_map) - set(tensors))
        if lost:
            problems.append(
                f"{index_path} names {len(lost)} tensors that its files do not hold "
                f"({_first_names(lost)}); index and weights are of different models: download both"
            )
    return tensors


def _no_weights(folder: Path) -> str:
    """The problem of a folder without safetensors."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES and p.is_file())
    if not pickles:
        gguf = " (.gguf files in a folder are not supported)" if any(folder.glob("*.gguf")) else ""
        return f"{folder} holds no weights{gguf}; expected model.safetensors: download it"
    return (
        f"{folder} holds weights only as {', '.join(pickles[:3])}, a pickle, which can run any "
        "code when it is read; expected safetensors. If you trust the file, convert it once with: "
        + CONVERT.format(
            source=shlex.quote(str(folder)), target=shlex.quote(f"{folder}-safetensors")
        )
    )


def _check_vocabulary(
    folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo], problems: list[str]
) -> None:
    shapes = [t.shape for name, t in tensors.items() if name.endswith(EMBEDDINGS)]
    rows = [shape[0] for shape in shapes if shape]
    width = config.get("word_embed_proj_dim") or config.get("hidden_size") or config.get("n_embd")
    if shapes and isinstance(width, int) and shapes[0][1:] != (width,):
        problems.append(
            f"the embedding in {folder} has the shape {list(shapes[0])} but config.json says a "
            f"width of {width:,}; config.json and weights are of different models: use a matching "
            "pair"
        )
    size = config.get("vocab_size")
    if rows and isinstance(size, int) and rows[0] != size:
        problems.append(
            f"the embedding in {folder} has {rows[0]:,} rows but config.json says vocab_size "
            f"{size:,}; config.json and weights are of different models: use a matching pair"
        )
    have = rows[0] if rows else size
    tokenizer = _json(folder / "tokenizer.json", problems)
    if tokenizer is None or not isinstance(have, int):
        return
    try:
        last = max(_token_ids(tokenizer), default=-1)
    except (TypeError, AttributeError, KeyError) as error:
        problems.append(
            f"{folder / 'tokenizer.json'} is not a tokenizer ({type(error).__name__}: {error}); "
            "expected an intact copy of it"
        )
        return
    if last >= have:
        problems.append(
            f"the tokenizer in {folder} has tokens up to id {last:,}, the model's embedding "
            f"only {have:,} rows; expected more than {last:,}: use the tokenizer that the "
            "model was trained with, or call resize_token_embeddings and save the model again"
        )
    elif 0 <= last < have // 2:  # padding adds some hundred rows, never as many as there are tokens
        problems.append(
            f"the tokenizer in {folder} has tokens up to id {last:,} only, the model's embedding "
            f"{have:,} rows; it is the tokenizer of another model: use the one that the model was "
            "trained with"
        )


def _token_ids(tokenizer: dict[str, Any]) -> list[int]:
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = list(
        vocabulary.values()
        if isinstance(vocabulary, dict)
        else range(len(vocabulary))  # Unigram: a list of pairs, in the order of the ids
    )
    ids += [token["id"] for token in tokenizer.get("added_tokens") or ()]
    if odd := [number for number in ids if type(number) is not int]:
        raise TypeError(f"the token id {str(odd[0])[:60]!r} is not an integer")
    if not ids:
        raise KeyError("vocab")
    return ids


def _has_eos(folder: Path, config: dict[str, Any]) -> bool:
    ignored: list[str] = []
    generation = _json(folder / "generation_config.json", ignored) or {}
    if config.get("eos_token_id") is not None or generation.get("eos_token_id") is not None:
        return True
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (_json(folder / name, ignored) or {}).get("eos_token"):
            return True
    return False
