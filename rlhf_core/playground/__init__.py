"""The web page on which people compare models: `rlhf playground`.

catalogue     the runs and models on offer
pool          models in memory
replies       replies of several models to one message
conversation  histories and feedback; render: their chat bubbles
agreement     of votes with the reward model
texts         texts of the page, in English and Chinese
page          event handlers (Gradio); layout: components; server: starts the page
guard         what may be asked of the page, and what its browser may load

Only `page` and `layout` import Gradio, and only functions that compute import torch.
"""
