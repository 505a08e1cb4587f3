"""Brings a base model into the store: safetensors, tokenizer, chat template, generation settings.

Runs as one plain process. The artifact is a Hugging Face folder that `from_pretrained` opens:

    config.json  generation_config.json  model.safetensors (a large one: files of some layers each)
    tokenizer.json  tokenizer_config.json  chat_template.jinja

The weights keep their dtype (the built-in GGUF becomes bf16). Embeddings are never resized: where
the vocabulary lacks a template's markers (ChatML on gpt2), they are written as ordinary text and
the end-of-sequence token ends a turn; without that token the model is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import ModelError
from rlhf_core.jobs import BaseJob, ImportModelJob
from rlhf_core.model_files.folder_check import check_loaded, check_weight_files
from rlhf_core.model_files.source import Source, builtin_gguf, fingerprint, parse_source
from rlhf_core.runtime.context import StageContext
from rlhf_core.store import Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Loaded:
    """A loaded model that will be published."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    license: str | None = None
    parents: list[str] = field(default_factory=list)
    folder: Path | None = None  # that it was read from


def run(job: ImportModelJob, context: StageContext) -> Artifact:
    """Import the model that the job names and publish it.

    Raises:
        ModelError: the source cannot be reached or used; the message says what to do.
    """
    return import_as(job, job, context)


def import_as(
    given: ImportModelJob,
    job: BaseJob,
    context: StageContext,
    check: Callable[[Loaded], None] | None = None,
) -> Artifact:
    """Import a model and publish it as the result of a job.

    Args:
        given: names the model. check: may refuse what was loaded.
    """
    source = parse_source(given.source)
    quiet()
    context.log(f"importing {given.source}")
    loaded = _load(given, source, context)
    if check is not None:
        check(loaded)
    own = loaded.tokenizer.chat_template
    ends = prepare_tokenizer(loaded.tokenizer, given.chat_template, given.source)
    if note := template_note(own, loaded.tokenizer.chat_template, given.chat_template):
        context.log(note)
    _check_vocabulary(loaded, given.source)
    set_generation(loaded, ends)
    folder = context.scratch("model")
    save(loaded.model, loaded.tokenizer, folder)
    if loaded.folder is not None:
        from rlhf_core.models.nf4_adapters import copy_factors

        copy_factors(loaded.folder, folder)
    context.log(f"imported {loaded.model.num_parameters():,} parameters; publishing")
    metadata = describe(loaded, ends, given.source, given.revision)
    return context.publish(job, folder, metadata, parents=loaded.parents)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer as a Hugging Face folder, the same bytes for the same content."""
    from rlhf_core.models.saving import save_in_files

    model.config._name_or_path = ""
    tokenizer.name_or_path = ""
    tokenizer.init_kwargs.pop("name_or_path", None)
    save_in_files(model, folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600


# --------------------------------------------------------------------------- loading


def _load(job: ImportModelJob, source: Source, context: StageContext) -> Loaded:
    if source.kind == "random":
        from rlhf_core.models.random_model import make_model, make_tokenizer

        tokenizer = make_tokenizer()
        return Loaded(make_model(source.value, tokenizer, job.seed), tokenizer)
    if source.kind == "builtin":
        return _load_builtin(job, source)
    if source.kind == "artifact":
        artifact = context.store.get(source.value)
        if artifact.kind != "model":
            raise ModelError(
                f"{job.source} is of kind {artifact.kind!r}; expected a 'model': see "
                "`rlhf artifacts list --kind model`"
            )
        loaded = _load_folder(job, context.store.fetch(artifact.digest))
        loaded.license = loaded.license or artifact.metadata.get("license")
        loaded.parents = [artifact.digest]
        return loaded
    if source.kind == "folder":
        return _load_folder(job, source.folder)
    return _load_hub(job)


def quiet() -> None:
    """Keep progress bars and notices of the Hugging Face libraries out of the stage's log."""
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, which comes next
    import logging

    from transformers.utils import logging as hf_logging

    # Its progress bars and retry notices would fill the stage's log.
    hf_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # Otherwise transformers asks the hub to convert pickles on its own server.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"


def _load_builtin(job: ImportModelJob, source: Source) -> Loaded:
    path, found = builtin_gguf(source.value), fingerprint(job.source)
    if job.fingerprint and found != job.fingerprint:
        raise ModelError(
            f"{job.source} is {found} on this machine, but the run was planned with "
            f"{job.fingerprint}; install the same version on both: requirements/demo.txt pins it"
        )
    return _load_gguf(path)


def _load_gguf(path: Path) -> Loaded:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model, info = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),  # a quantised model cannot be saved
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    check_loaded(info, str(path))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return Loaded(model, tokenizer, license="apache-2.0")


def _load_folder(job: ImportModelJob, folder: Path) -> Loaded:
    problems = check_weight_files(folder)
    if problems:
        raise ModelError(" ".join(problems))
    readme = folder / "README.md"
    loaded = _from_pretrained(job, str(folder))
    loaded.folder = folder
    loaded.license = _license(readme.read_text(errors="replace")) if readme.is_file() else None
    return loaded


def _load_hub(job: ImportModelJob) -> Loaded:
    from transformers.utils import cached_file

    loaded = _from_pretrained(job, job.source)
    readme = cached_file(
        job.source,
        "README.md",
        revision=job.revision or "main",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if readme is not None:
        loaded.license = _license(Path(readme).read_text(errors="replace"))
    return loaded


def _from_pretrained(job: ImportModelJob, where: str) -> Loaded:
    """Load weights (safetensors only, in their own dtype) and tokenizer: a folder or the hub."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": job.trust_remote_code}
    if job.revision is not None:
        options["revision"] = job.revision
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            where, dtype="auto", use_safetensors=True, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ModelError(_advice(job, error)) from error
    check_loaded(info, job.source)
    return Loaded(model, tokenizer)


def _advice(job: ImportModelJob, error: Exception) -> str:
    text = " ".join(str(error).split())
    name = f"{job.source}{f' (revision {job.revision})' if job.revision else ''}"
    if "couldn't connect" in text or "offline" in text.lower():
        return (
            f"{name} is not in this machine's Hugging Face cache, and the hub cannot be reached; "
            "use a network, or a cache filled elsewhere with `hf download "
            f"{job.source}`, or a local folder, or model.source builtin:smollm2-135m-instruct"
        )
    if "gated" in text or "401" in text:
        return (
            f"{name} is private, gated or does not exist; accept its terms on huggingface.co and "
            f"log in with `hf auth login`, or correct the id. The hub said: {text[:300]}"
        )
    if "trust_remote_code" in text:
        return (
            f"{name} contains Python code of its own; read it, then set model.trust_remote_code to "
            "true, or use a model that transformers supports"
        )
    if "safetensors" in text and "named" in text:
        return (
            f"{name} has no safetensors weights, only pickles, which can run any code when they "
            "are loaded; convert it once to a local folder: https://huggingface.co/spaces/safetensors/"
            "convert, or AutoModelForCausalLM.from_pretrained(id).save_pretrained(folder)"
        )
    return f"{name} cannot be loaded as a causal language model: {text[:500]}"


def _license(readme: str) -> str | None:
    """The license in a model card's front matter."""
    head = re.match(r"---\s*\n(.*?)\n---", readme, re.DOTALL)
    found = re.search(r"^license:\s*['\"]?([\w.-]+)", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


# --------------------------------------------------------------------------- what is published


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, choice: str, source: str) -> list[int]:
    """Give the tokenizer its chat template and a pad token; return the ids that end a turn.

    The first id is the template's end-of-turn token, followed by that of calls of tools, if it is
    another one, and by the tokenizer's end of sequence.

    Raises:
        ModelError: no token ends a turn, or the chosen template needs tokens that are missing.
    """
    from rlhf_core.data.encoding.templates import end_of_turn, ends_of_turns, resolve_template

    try:
        tokenizer.chat_template = resolve_template(tokenizer, choice)
        text, end = end_of_turn(tokenizer)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = text
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # an existing token: the vocabulary stays
    ends = tokenizer.convert_tokens_to_ids(ends_of_turns(tokenizer))
    return list(dict.fromkeys([end, *ends, tokenizer.eos_token_id]))


def template_note(own: str | dict[str, str] | None, chosen: str, choice: str) -> str:
    """What there is to say about a chat template that is not the tokenizer's only one; "" else."""
    if not own:
        name = "chatml" if choice == "auto" else choice
        return f"the tokenizer has no chat template; the built-in {name} is used"
    if isinstance(own, dict):
        used, names = "default" if choice == "auto" else choice, ", ".join(own)
        return f"the tokenizer has the chat templates {names}; {used} is used"
    return "" if own == chosen else f"{choice} takes the place of the tokenizer's own chat template"


def _check_vocabulary(loaded: Loaded, source: str) -> None:
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    last = max(loaded.tokenizer.get_vocab().values())
    if last >= rows:
        raise ModelError(
            f"the tokenizer of {source} has tokens up to id {last:,}, the model's embedding only "
            f"{rows:,} rows; use the tokenizer that the model was trained with, or call "
            "resize_token_embeddings and save the model again"
        )


def set_generation(loaded: Loaded, ends: list[int]) -> None:
    """Set the tokens that end a reply in `generate`: end of turn, and the model's own ones."""
    from transformers import GenerationConfig

    generation = loaded.model.generation_config or GenerationConfig()
    for eos in (generation.eos_token_id, loaded.model.config.eos_token_id):
        ids = eos if isinstance(eos, list) else [eos]
        ends += [token for token in ids if token is not None and token not in ends]
    try:
        generation.validate(strict=True)
    except ValueError:  # contradictory settings cannot be saved
        generation = GenerationConfig(bos_token_id=generation.bos_token_id)
    generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    generation.pad_token_id = loaded.tokenizer.pad_token_id
    loaded.model.config.pad_token_id = loaded.tokenizer.pad_token_id
    loaded.model.generation_config = generation


def describe(
    loaded: Loaded, ends: list[int], source: str, revision: str | None = None
) -> dict[str, Any]:
    """Metadata of a model's artifact; `ends` are the ids that end a turn."""
    config = loaded.model.config
    context = getattr(config, "max_position_embeddings", getattr(config, "seq_length", None))
    return {
        "source": source,
        "revision": revision,
        "architecture": type(loaded.model).__name__,
        "parameters": loaded.model.num_parameters(),
        "vocab_size": int(loaded.model.get_input_embeddings().weight.shape[0]),
        "context_length": context,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "license": loaded.license,
        "end_of_turn": [loaded.tokenizer.convert_ids_to_tokens(token) for token in ends],
    }
