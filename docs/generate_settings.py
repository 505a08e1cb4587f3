"""Write docs/settings.md from the docstrings under the settings' fields.

Usage: python docs/generate_settings.py

The source is the JSON schema that Prefect's form is made of, so page and form say the same.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rlhf_core.jobs import LARGEST, PipelineConfig
from rlhf_core.store.settings import StoreSettings

PAGE = Path(__file__).with_name("settings.md")

INTRODUCTION = """\
<!-- Made by docs/generate_settings.py from the docstrings in rlhf_core/jobs. Do not edit. -->

# Settings

Every setting of a run, with its default. A preset, or a file for `--config`, holds only what
differs from the defaults. `--set` changes one setting by its path:

```bash
rlhf run --preset demo --set ppo.kl_coef=0.1 --set sft.trainable_layers= --set 'sft.lora={rank: 8}'
```

An empty value (`--set sft.trainable_layers=`) means "none". `rlhf run --dry-run` checks a
configuration and shows what it sets. A stage's own `resources` override the top-level ones, setting
by setting.
"""

ENVIRONMENT = """\
## Environment

These variables are not settings of a run. They never enter a job, a log or an artifact.

| variable | what it does |
| --- | --- |
| `RLHF_STORE` | URL of the artifact store, unless `store` or `--store` is given |
| `RLHF_HOME` | folder for local files; default: the nearest `.rlhf` upward, else a new one |
| `RLHF_AUTHOR` | author of the runs that are started here, unless `author` is given |
| `PREFECT_API_URL` | Prefect server to use; without one, a run starts a server of its own |
| `PREFECT_API_AUTH_STRING` | its login, USER:PASSWORD; that of `rlhf up` is found without |
| `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` | keys of an S3 store |
| `GOOGLE_APPLICATION_CREDENTIALS` | file with the credentials of a `gs://` store |
| `AZURE_STORAGE_ACCOUNT_NAME`, `AZURE_STORAGE_ACCOUNT_KEY` | of an `az://` store |
"""


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")


def render() -> str:
    """The whole page."""
    schema = PipelineConfig.model_json_schema()
    models: dict[str, Any] = schema["$defs"]
    paths = _paths(schema, models)
    parts = [INTRODUCTION, "## Top level\n", _table(schema)]
    for name, places in paths.items():
        parts += [f"\n## {name}\n", f"{models[name].get('description', '')}\n"]
        parts += [f"At: {', '.join(f'`{place}`' for place in places)}.\n"]
        parts += [_table(models[name])]
    parts += ["", ENVIRONMENT.rstrip("\n")]
    for name, field in StoreSettings.model_json_schema()["properties"].items():
        default = _default(field)
        shown = f"; default {default}" if default else ""
        text = _cell(field["description"]).rstrip(".")
        parts.append(f"| `RLHF_STORE_{name.upper()}` | {text}{shown} |")
    return "\n".join(parts) + "\n"


def _paths(schema: dict[str, Any], models: dict[str, Any]) -> dict[str, list[str]]:
    """Model name -> the paths at which it stands, in the order of the configuration."""
    found: dict[str, list[str]] = {}

    def walk(properties: dict[str, Any], prefix: str) -> None:
        for name, field in properties.items():
            for model in _references(field):
                places = found.setdefault(model, [])
                if prefix + name not in places:  # two variants of a section have it
                    places.append(prefix + name)
                walk(models[model]["properties"], f"{prefix}{name}.")

    walk(schema["properties"], "")
    return found


def _references(field: dict[str, Any]) -> list[str]:
    items = field.get("items", {})
    options = [field, *field.get("anyOf", []), items, *items.get("anyOf", [])]
    return [str(o["$ref"]).rsplit("/", 1)[-1] for o in options if "$ref" in o]


def _table(model: dict[str, Any]) -> str:
    rows = ["| setting | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model["properties"].items():
        meaning = _cell(field.get("description", ""))
        rows.append(f"| `{name}` | {_value(field)} | {_default(field)} | {meaning} |")
    return "\n".join(rows)


def _value(field: dict[str, Any]) -> str:
    """What may stand there, in words."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(_value(o) for o in field["anyOf"] if o.get("type") != "null")
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if items := [name for name in _references(field) if field.get("type") == "array"]:
        return "list of " + " or ".join(f"[{name}](#{name.lower()})" for name in items)
    words = {"integer": "integer", "number": "number", "string": "text", "boolean": "true, false"}
    kind = {"array": "list of texts", "object": "mapping"} | words
    return ", ".join([kind[field["type"]], *_bounds(field)])


def _bounds(field: dict[str, Any]) -> list[str]:
    symbols = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return [
        f"{symbol} {field[key]:.10g}"
        for key, symbol in symbols.items()
        if key in field and abs(field[key]) != LARGEST  # which only keeps numbers finite
    ]


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    if value in (None, "") or isinstance(value, dict):
        return ""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`"


def _cell(text: str) -> str:
    plain = re.sub(r"\s+", " ", text).replace("``", "`").replace("|", "\\|").strip()
    return plain.replace("<", "&lt;")  # artifact:<digest> would be taken for HTML


if __name__ == "__main__":
    main()
