"""A model over an OpenAI-compatible API, by a server that others keep well.

engine      which server: vLLM's where it is installed, else transformers' own
hugging     transformers' server with one model, under its published name
vllm_server vLLM's; engine_process: ends with it; engine_output: kept back until it serves
auth        what stands before them: API key, allowed paths, today's names of settings
listening   the address, taken before a model is loaded
"""

from rlhf_core.serving.engine import Engine, main

__all__ = ["Engine", "main"]
