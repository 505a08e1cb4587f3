"""Serves a model over an OpenAI-compatible API, with vLLM or with transformers.

engine               picks the server: vLLM if it is installed, else transformers
auth                 middleware in front of both: key, paths, model, body, special tokens
api_error            errors in OpenAI's form
listening            the listening socket, opened before the model is loaded

transformers_server  this project's server, with a model of transformers
api, responses_api   its handlers; requests: the parameters that they obey
generator            the thread that generates all replies; batch: its rows of keys and values
sampling, reply_text a row's next token, and its text up to a stop string

vllm_server          vLLM's server; engine_process: its child processes; engine_output: their output
"""

from rlhf_core.serving.engine import Engine, main

__all__ = ["Engine", "main"]
