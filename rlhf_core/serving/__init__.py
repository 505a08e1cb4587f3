"""Serves a model over an OpenAI-compatible API, with the server of vLLM or transformers.

engine               picks the server: vLLM if it is installed, else transformers
transformers_server  transformers' server with one model, under its published name
vllm_server          vLLM's server; engine_process: its child processes; engine_output: their output
auth                 middleware in front of them: API key, allowed paths, field names
listening            the listening socket, opened before the model is loaded
"""

from rlhf_core.serving.engine import Engine, main

__all__ = ["Engine", "main"]
