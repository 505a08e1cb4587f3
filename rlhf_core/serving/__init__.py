"""A model over an OpenAI-compatible API, by a server that others keep well.

engine  which server: vLLM where it is installed, else transformers' own
hugging transformers' server with one model, under its published name
door    what stands before it: API key, allowed paths, today's names of settings
"""

from rlhf_core.serving.engine import Engine, main

__all__ = ["Engine", "main"]
