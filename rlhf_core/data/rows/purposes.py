"""What rows of each format can be used for."""

from __future__ import annotations

from rlhf_core.data.rows.advice import instead
from rlhf_core.data.rows.layout import FORMAT_COLUMNS
from rlhf_core.errors import DataError
from rlhf_core.jobs import Format, Purpose

PURPOSES_OF: dict[str, tuple[Purpose, ...]] = {
    "alpaca": ("sft", "prompts", "pretrain"),
    "messages": ("sft", "prompts", "pretrain"),
    "sharegpt": ("sft", "prompts", "pretrain"),
    "prompt_completion": ("sft", "prompts", "pretrain"),
    "hh": ("preference", "sft", "prompts", "pretrain"),
    "preference": ("preference", "sft", "prompts", "pretrain"),
    "implicit_prompt": ("preference", "sft", "prompts", "pretrain"),
    "unpaired": ("unpaired", "sft", "prompts", "pretrain"),
    "prompt": ("prompts",),
    "text": ("pretrain", "sft", "prompts"),
}


def check_purpose(format: Format, purpose: Purpose, found: str = "") -> None:
    """Check that rows of a format can be used for a purpose.

    Args:
        found: columns of a row, and advice about them, for the error.

    Raises:
        DataError: they cannot; the text lists the possible purposes and formats.
    """
    if purpose not in PURPOSES_OF[format]:
        able = [name for name, purposes in PURPOSES_OF.items() if purpose in purposes]
        columns = ", ".join(f"{name} {FORMAT_COLUMNS[name]}" for name in able)
        todo = "" if "set columns" in found else instead(format, purpose)
        raise DataError(
            f"{found}{todo}Format {format} can be used for "
            f"{', '.join(PURPOSES_OF[format])}, not for {purpose}; the formats for {purpose} are "
            f"{columns}."
        )
