"""The page to try models on: `rlhf playground`.

votes       preference rows in the store; read as the data set `playground-votes`
catalogue   what can be chosen
pool        models in memory, and which of them go first
asking      one question to several models at once
texts       what the page says, in English and Chinese
page        the page (Gradio)

Only `pool`, `asking` and `page` import torch or Gradio.
"""
