"""Recognising a git-lfs pointer in place of a file."""

from __future__ import annotations

LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
