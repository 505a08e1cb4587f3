"""Base and finished model on standard benchmarks, by EleutherAI's lm-evaluation-harness.

Writes lm_eval.json:

    lm_eval   version of the harness
    shown     names for a table, in the order of the settings; a group represents its tasks
    tasks     name -> n (examples), of (examples there are), num_fewshot, higher_is_better
    models    base, policy -> task -> "metric,filter" -> value, stderr (null: none, or not finite)
    contamination  name in lm_eval.tasks -> data set -> how much of the examples' questions its
              training rows have (rlhf_core/data/overlap/result.py)
    change    task -> "metric,filter" -> value (policy minus base), stderr (of the mean of the
              differences on the same examples; null where the metric is no mean of theirs)
"""

from __future__ import annotations

import json
import os
import random
import traceback
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import torch

from rlhf_core.data.encoding.tokenizer import load_tokenizer
from rlhf_core.data.overlap.datasets import contamination
from rlhf_core.errors import ConfigError, DataError, ModelError
from rlhf_core.evaluation.harness.numbers import summary
from rlhf_core.evaluation.harness.questions import questions
from rlhf_core.evaluation.harness.tasks import INSTALL, installed
from rlhf_core.jobs import LmEvalJob
from rlhf_core.model_files.remote_code import is_trusted
from rlhf_core.runtime.context import StageContext
from rlhf_core.runtime.distributed import Group
from rlhf_core.store import Artifact

if TYPE_CHECKING:
    from rlhf_core.evaluation.harness.loading import Loaded
    from rlhf_core.evaluation.harness.shared import SharedLM

MODELS = ("base", "policy")
"""Names in the report, and fields of the job."""

BOOTSTRAPS = 1000  # resamples for the standard error of a metric that is not a mean
# What the code and the templates of a task raise, unlike a lack of memory or a lost rank.
TASK_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError,
    TypeError, ValueError, jinja2.TemplateError,
)  # fmt: skip


def run(job: LmEvalJob, context: StageContext) -> Artifact | None:
    """Measure both models, one after the other. Rank 0 returns the artifact."""
    if not installed():
        raise ConfigError(f"the package lm-eval is not installed where the stage runs; {INSTALL}")
    from rlhf_core.evaluation.harness.loading import load_tasks, silence_libraries
    from rlhf_core.evaluation.harness.shared import SharedLM

    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness would fork this process for its bootstrap

    group = Group(job.resources)
    silence_libraries(False)  # the harness warns that the model is already loaded
    loaded = load_tasks(job) if context.main else None
    found: dict[str, Any] = {}
    for name in MODELS:
        lm = SharedLM(
            name, context.store.fetch(getattr(job, name)), dtype_of(job, group.device), group,
            job.resources.micro_batch_size, context, job.seed,
        )  # fmt: skip
        if job.apply_chat_template and not lm.tokenizer.chat_template:
            raise ModelError(
                f"the {name} model has no chat template, and lm_eval.apply_chat_template is true; "
                "set it to false, or model.chat_template to chatml"
            )
        if loaded is None:
            lm.serve()
        else:
            silence_libraries(True)
            found[name] = measure(lm, loaded, job)
            lm.dismiss()
            silence_libraries(False)
        del lm
    if loaded is None:
        return None
    result = summary(found, loaded.members)
    result["contamination"] = look_for_questions(job, loaded, context)
    folder = context.scratch("result")
    (folder / "lm_eval.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return context.publish(job, folder, {"metrics": result})


def dtype_of(job: LmEvalJob, device: torch.device) -> torch.dtype:
    """The dtype in which a job's models compute on a device."""
    auto = "bf16" if device.type == "cuda" else "fp32"
    chosen = auto if job.precision == "auto" else job.precision
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen]


def measure(lm: SharedLM, loaded: Loaded, job: LmEvalJob) -> dict[str, Any]:
    """The harness's results of one model.

    As its simple_evaluate, without the twenty seconds that one takes to describe the machine.

    Raises:
        DataError: a task fails on its own data, or on this model.
    """
    from lm_eval.evaluator import evaluate

    for name, task in loaded.items["tasks"].items():
        own = task.get_config("num_fewshot")
        if own is None or (own != 0 and job.num_fewshot is not None):
            task.set_config(key="num_fewshot", value=job.num_fewshot or 0)
        elif job.num_fewshot:
            lm.context.log(f"{name}: stays without examples: the task sets num_fewshot 0")
        task.set_fewshot_seed(seed=job.seed)
    random.seed(job.seed)
    np.random.seed(job.seed)
    try:
        return evaluate(  # type: ignore[no-any-return]
            lm=lm,
            task_dict=loaded.items,
            limit=job.limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            apply_chat_template=job.apply_chat_template,
            fewshot_as_multiturn=job.apply_chat_template,
        )
    except TASK_FAULTS as error:
        raise DataError(
            f"lm-eval failed while it measured the {lm.name} model with "
            f"{', '.join(job.tasks)[:200]} ({_where(error)}). Correct the task's files, or leave "
            "the task out of lm_eval.tasks."
        ) from error


def look_for_questions(job: LmEvalJob, loaded: Loaded, context: StageContext) -> dict[str, Any]:
    """How much of the tasks' questions is in the data that the policy was trained on."""
    fetch = context.store.fetch
    folders = {name: fetch(digest) for name, digest in job.training_data().items()}
    if not folders:
        return {}
    tasks, model = loaded.items["tasks"], fetch(job.base)
    asked = {
        name: [text for member in members for text in questions(tasks[member], job.limit)]
        for name, members in loaded.members.items()
    }
    return contamination(asked, folders, load_tokenizer(model, is_trusted(model)))


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:400]
    return f"{type(error).__name__} in {frame.filename}, line {frame.lineno}: {text}"
