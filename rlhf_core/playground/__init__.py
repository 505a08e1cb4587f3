"""The page to try models on: `rlhf playground`.

catalogue   what can be chosen
pool        models in memory, and which of them go first
asking      one question to several models at once
conversation, render   what was said, and how it is shown
texts       what the page says, in English and Chinese
page        what the page does (Gradio); layout: where things stand; serving: the server

Only `page` and `layout` import Gradio, and only functions that compute import torch.
"""
