#!/usr/bin/env bash
# bitsandbytes 0.50.2, NF4: an adapter merged into its own quantised base is lost when the sum is quantised again.
#
# One would have guessed: to quantise a merged model loses some precision, as quantising any model does, and what a
# QLoRA run has learned survives it as well as the rest of the weights. That is so if the adapter is merged into the
# ORIGINAL weights. But QLoRA trains against the quantised weights, so the model with the loss of the training is the
# dequantised base plus the adapter. Every weight of that sum lies so near to the 4-bit value which it came from that
# it snaps back: of an adapter with 1 % of the weights' standard deviation, 1.5 % is left, and the model answers as it
# did before its training. Nothing warns.
#
# Whom it hurts: who runs several QLoRA stages one after another (SFT, then DPO or PPO) through merged checkpoints, and
# who serves a merged QLoRA model with load_in_4bit.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import logging
logging.disable(logging.WARNING)
import bitsandbytes, torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

def quantised(weight):
    codes, state = quantize_4bit(weight.bfloat16().contiguous(), quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(codes, state).float()

print("torch", torch.__version__, "bitsandbytes", bitsandbytes.__version__)
torch.manual_seed(0)
weight = (torch.randn(1024, 1024) * 0.02).bfloat16().float()
base = quantised(weight)
left = {}
for size in (0.003, 0.01, 0.03, 0.1):
    delta = torch.randn(1024, 8) @ torch.randn(8, 1024)
    delta *= size * weight.std() / delta.std()
    share = lambda found: float((found * delta).sum() / delta.square().sum())
    left[size] = share(quantised(base + delta) - base), share(quantised(weight + delta) - base)
    print(f"adapter of {size:5.1%} of the weights' size: left of it after quantising the sum with "
          f"the quantised base {left[size][0]:4.0%}, with the original weights {left[size][1]:4.0%}")
assert left[0.01][0] < 0.05 and left[0.01][1] > 0.9
PY
"$folder/venv/bin/python" "$folder/probe.py"
# Output seen:
# torch 2.13.0+cpu bitsandbytes 0.50.2
# adapter of  0.3% of the weights' size: left of it after quantising the sum with the quantised base   1%, with the original weights  90%
# adapter of  1.0% of the weights' size: left of it after quantising the sum with the quantised base   2%, with the original weights 100%
# adapter of  3.0% of the weights' size: left of it after quantising the sum with the quantised base   6%, with the original weights  99%
# adapter of 10.0% of the weights' size: left of it after quantising the sum with the quantised base  84%, with the original weights  99%
