"""Files of the presets. Imports nothing slow, since the shell's completion lists them."""

from __future__ import annotations

from importlib.resources import files


def preset_names() -> list[str]:
    """Names of the presets, sorted."""
    folder = files("deployments") / "presets"
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def preset_text(name: str) -> str:
    """The YAML of a preset; its first line is a comment that says what the preset is for."""
    return (files("deployments") / "presets" / f"{name}.yaml").read_text("utf-8")
