"""The web page on which people compare models: `rlhf playground`.

catalogue     the runs and models on offer
pool          models in memory
replies       replies of several models to one message
conversation  histories and feedback; render: their chat bubbles
texts         texts of the page, in English and Chinese
page          event handlers (Gradio); layout: components; server: starts the page

Only `page` and `layout` import Gradio, and only functions that compute import torch.
"""
