"""TRL prepares conversations for SFT: `python peer.py FILE TOKENIZER PROCESSES`, in .venv-bench.

Calls what SFTTrainer calls before training, with the loss on replies only: chat template with
masks, labels, truncation. Prints one line of JSON. PROCESSES is `dataset_num_proc`; 0: None.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

LENGTH = 2048
# SmolLM2's turns, with the marks that TRL asks for to know the replies.
TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}"""


def main() -> None:
    file, tokenizer_folder, processes = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = scratch  # nothing is reused
        from datasets import load_dataset
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        settings = SFTConfig(
            output_dir=scratch, report_to="none", use_cpu=True, bf16=False,
            dataset_num_proc=int(processes) or None, assistant_only_loss=True, max_length=LENGTH,
        )  # fmt: skip
        began = time.perf_counter()
        tokenizer = AutoTokenizer.from_pretrained(Path(tokenizer_folder))
        tokenizer.chat_template = TEMPLATE
        trainer = SimpleNamespace(
            _tokenizer=tokenizer, chat_template=TEMPLATE, completion_only_loss=False
        )
        rows = load_dataset("json", data_files=file, split="train")
        prepared = SFTTrainer._prepare_dataset(
            trainer, rows, tokenizer, settings, False, None, "train"
        )
        seconds = time.perf_counter() - began
        tokens = sum(len(row) for row in prepared["input_ids"])
    print(json.dumps({"preparing": seconds, "rows": len(prepared), "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
