"""Imports an existing reward model into the store, for runs without a reward stage.

Two kinds of folder are read: what a reward stage of this project published, and a transformers
model for sequence classification with one label, whose score is the `score` layer's output at the
last token (as TRL's RewardTrainer and most reward models on the hub have it). Its scores are taken
as they are: mean 0 and standard deviation 1 are saved with them.

Its vocabulary must equal the language model's, token by token: it will read that model's ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf_core.errors import ModelError
from rlhf_core.jobs import ImportRewardJob
from rlhf_core.model_files.folder_check import REWARD_HEAD, check_loaded, check_weight_files
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.model_files.source import parse_source
from rlhf_core.models.loading import load_scalar_model
from rlhf_core.models.nf4_adapters import copy_factors
from rlhf_core.models.saving import save_scalar_model
from rlhf_core.nn.modules import ScalarModel
from rlhf_core.runtime.context import StageContext
from rlhf_core.stages.vocabulary import check_same_vocabulary
from rlhf_core.store import Artifact


def run(job: ImportRewardJob, context: StageContext) -> Artifact:
    """Import the reward model that the job names and publish it.

    Raises:
        ModelError: the source cannot be reached or used, or reads another vocabulary.
    """
    context.log(f"importing reward model {job.source}")
    base = context.store.fetch(job.model)
    source = parse_source(job.source)
    if source.kind == "artifact":
        artifact = context.store.get(source.value)
        if artifact.kind != "reward_model":
            raise ModelError(
                f"reward_model is {artifact.ref}, of kind {artifact.kind!r}; expected a "
                "'reward_model': see `rlhf artifacts list --kind reward_model`"
            )
        place: Path | str = context.store.fetch(artifact.digest)
    elif source.kind == "folder":
        place = source.folder
    elif source.kind == "hub":
        place = own_snapshot(job) or job.source
    else:
        raise ModelError(
            f"reward_model is {job.source}; expected artifact:DIGEST, a local folder, or a "
            "Hugging Face id"
        )
    if isinstance(place, Path) and (problems := check_weight_files(place, is_language_model=False)):
        raise ModelError(" ".join(problems))
    check_vocabulary(job, place, base)
    ours = isinstance(place, Path) and (place / REWARD_HEAD).exists()
    model = load_scalar_model(place) if ours else load_classifier(job, place)  # type: ignore[arg-type]
    folder = context.scratch("reward")
    save_scalar_model(model, folder, base)
    if ours:
        copy_factors(place, folder)  # type: ignore[arg-type]
    return context.publish(job, folder, {"source": job.source})


def own_snapshot(job: ImportRewardJob) -> Path | None:
    """Folder of a hub model, if it is what a reward stage of this project published."""
    from huggingface_hub import snapshot_download
    from transformers.utils import cached_file

    try:
        head = cached_file(
            job.source, REWARD_HEAD, revision=job.revision or "main",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except OSError:  # no such model: loading its tokenizer will report it
        return None
    if head is None:
        return None
    kept = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # no pickles
    return Path(snapshot_download(job.source, revision=job.revision, allow_patterns=kept))


def load_classifier(job: ImportRewardJob, place: Path | str) -> ScalarModel:
    """A transformers model for sequence classification with one label, as a `ScalarModel`."""
    from transformers import AutoModelForSequenceClassification

    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            place, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
            revision=job.revision or "main", trust_remote_code=job.trust_remote_code,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        text = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{job.source} cannot be loaded as a reward model: {text}; expected a model for "
            "sequence classification with one label in safetensors, or a reward stage's result"
        ) from error
    if any("score" in key for key in info.get("missing_keys") or ()):
        raise ModelError(
            f"{job.source} has no trained score layer (it is a {model.config.model_type} language "
            "model, perhaps); expected a model for sequence classification with one label, or a "
            "reward stage's result"
        )
    check_loaded(info, job.source)
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear) or head.out_features != 1:
        labels = model.config.num_labels
        raise ModelError(
            f"{job.source} gives {labels} label{'s' if labels != 1 else ''} from "
            f"{type(head).__name__ if head is not None else 'no layer named score'}; expected one "
            "number from a linear layer named score"
        )
    scalar = ScalarModel(model.base_model, head.in_features)
    with torch.no_grad():
        scalar.head.weight.copy_(head.weight)
        scalar.head.bias.copy_(head.bias if head.bias is not None else torch.zeros(1))
    return scalar.eval()


def check_vocabulary(job: ImportRewardJob, place: Path | str, base: Path) -> None:
    """Refuse a reward model to which the same token ids mean other tokens."""
    from transformers import AutoTokenizer

    try:
        own: Any = AutoTokenizer.from_pretrained(
            place, revision=job.revision or "main", trust_remote_code=job.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{job.source} has no tokenizer that can be read ({str(error)[:200]}); the "
            "weights must come with the tokenizer that they were trained with"
        ) from error
    ours = AutoTokenizer.from_pretrained(base, trust_remote_code=is_trusted(base)).get_vocab()
    check_same_vocabulary(
        ours, own.get_vocab(), f"the reward model {job.source}",
        "give a reward model that was trained from the same base model",
    )  # fmt: skip
