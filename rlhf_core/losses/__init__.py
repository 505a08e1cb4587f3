"""Losses as pure functions: tensors in, ``(loss, metrics)`` out.

Conventions, the same in every function:

* B sequences (or pairs), T response positions. A mask is bool, True is a real token.
* Log-probabilities are in nats and at the sampling temperature.
* Half-precision inputs are raised to fp32 first, so every loss is finite in bf16 and fp16.
* The content of padded positions (NaN, inf, garbage) reaches neither the loss nor a gradient.
* ``denominator``: a loss is a mean over the real tokens (or pairs) of the *global* batch. Pass
  the global count and the losses of all micro-batches and ranks *sum* to that mean; None means
  "this call is the whole batch". Metrics that are means share the denominator, so they sum too;
  metrics whose name ends in ``_max`` combine by maximum.
"""
