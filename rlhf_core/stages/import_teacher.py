"""Imports the teacher of a distillation into the store, as `import_model` does a base model.

Its vocabulary must equal the student's, token by token: it reads the student's replies as ids, and
the divergence compares probabilities token by token. Embeddings may be padded to another size.
"""

from __future__ import annotations

from rlhf_core.jobs import ImportModelJob
from rlhf_core.jobs.distillation import ImportTeacherJob
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.runtime.context import StageContext
from rlhf_core.stages import import_model
from rlhf_core.stages.vocabulary import check_same_vocabulary
from rlhf_core.store import Artifact


def run(job: ImportTeacherJob, context: StageContext) -> Artifact:
    """Import the teacher that the job names and publish it.

    Raises:
        ModelError: the source cannot be reached or used, or reads another vocabulary.
    """
    base = context.store.fetch(job.model)

    def compare(loaded: import_model.Loaded) -> None:
        from transformers import AutoTokenizer

        ours = AutoTokenizer.from_pretrained(base, trust_remote_code=is_trusted(base))
        check_same_vocabulary(
            ours.get_vocab(), loaded.tokenizer.get_vocab(), f"the teacher {job.source}",
            "give a teacher of the same family of models as the student",
        )  # fmt: skip

    given = ImportModelJob(
        source=job.source,
        seed=job.seed,
        trust_remote_code=job.trust_remote_code,
        fingerprint=job.fingerprint,
    )
    return import_model.import_as(given, job, context, compare)
