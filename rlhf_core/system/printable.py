"""Texts of other people, for a terminal."""

from __future__ import annotations

import re

# C0 and C1 controls but tab and newline, DEL, and what changes the direction of writing.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""The text with its control characters written out, as \u001b: in a terminal they would move
    the cursor, change the title or the clipboard, or hide what follows. Valid inside JSON."""
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
