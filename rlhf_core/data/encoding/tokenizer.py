"""Loads a tokenizer without importing torch.

`from transformers import AutoTokenizer` imports torch (3 to 6 s of CPU time). A folder with a
tokenizer.json needs only the tokenizers backend, which loads in 0.8 s. AutoTokenizer loads the
others: sentencepiece files without tokenizer.json, remote code, rarer models.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_core.errors import ModelError

# The classes that AutoTokenizer picks for these names, without its import.
_GENERIC = {"TokenizersBackend", "PreTrainedTokenizer", "BloomTokenizer"}
_SPECIAL = {"GPT2Tokenizer": "gpt2", "Qwen2Tokenizer": "qwen2", "LlamaTokenizer": "llama"}
_MODELS = {"llama", "qwen2", "gpt2", "opt", "bloom", ""}


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, with its special tokens and chat template.

    Args:
        trust_remote_code: run Python code that lies in the folder.

    Returns:
        A transformers tokenizer.

    Raises:
        ModelError: the folder holds no tokenizer, or one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"There is no folder {folder}; expected one with a tokenizer.json.")
    try:
        backend = _backend(folder)
        if backend is not None:
            return backend.from_pretrained(str(folder), local_files_only=True)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
        raise ModelError(
            f"The tokenizer in {folder} cannot be loaded ({type(error).__name__}: {error}). "
            f"The folder holds {found}; expected tokenizer.json with tokenizer_config.json, or the "
            "files that the model's tokenizer class reads. Download the model again, or save its "
            "tokenizer there with save_pretrained."
        ) from error


def overrides(tokenizer: Any, *methods: str) -> bool:
    """Whether the tokenizer's class has another method than transformers' general one."""
    general = ("transformers.tokenization_utils_base", "transformers.tokenization_utils_tokenizers")
    return any(getattr(type(tokenizer), name).__module__ not in general for name in methods)


@functools.lru_cache(maxsize=32)
def compiled_template(source: str) -> Callable[..., str]:
    """A function that renders a chat template with variables, as `apply_chat_template` does. That
    method looks up more, and lets jinja copy its globals from a chain: twice the time.

    Raises:
        jinja2.TemplateSyntaxError: the template is not valid.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = _compile_jinja_template(source)
    known = dict(template.globals)

    def rendered(**variables: Any) -> str:
        context = template.new_context(known | variables, shared=True)
        return "".join(template.root_render_func(context))

    return rendered


def _backend(folder: Path) -> Any:
    """The class that reads the folder's tokenizer.json; None if AutoTokenizer must pick it."""
    if not (folder / "tokenizer.json").is_file():
        return None
    config = _read_json(folder / "tokenizer_config.json")
    if config.get("auto_map") or _read_json(folder / "config.json").get("model_type", "") not in (
        _MODELS
    ):
        return None
    name = str(config.get("tokenizer_class") or "TokenizersBackend").removesuffix("Fast")
    try:
        if name in _GENERIC:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast
        if name in _SPECIAL:
            model = _SPECIAL[name]
            module = importlib.import_module(f"transformers.models.{model}.tokenization_{model}")
            return getattr(module, name)
    except (ImportError, AttributeError):  # another transformers: let AutoTokenizer decide
        return None
    return None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not JSON ({error}); download the model again.") from error
    return value if isinstance(value, dict) else {}
