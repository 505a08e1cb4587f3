#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU with AVX512-BF16: one pass without gradients through a Linear4bit in eval mode changes
# its weight for good, and no gradient goes through it any more.
#
# One would have guessed: a forward pass under torch.no_grad() leaves the model as it is. But Linear4bit.forward repacks
# the weight for an inference kernel, in place, when the module is in eval mode and its input needs no gradient. The
# repacking rounds the scales to bf16 (nested ones are thrown away), so the weight is another one; and the kernel has no
# backward: a later backward pass gives the layer's input no gradient. torch warns of it once; adapters below the layer
# then train on nothing.
#
# Whom it hurts: who evaluates, samples or computes reference log-probabilities with a QLoRA model in eval mode before
# or between its training steps on such a CPU (Sapphire Rapids, Zen 4). model.train() before each training pass does not
# help: the weight stays packed.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import logging, warnings
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
import bitsandbytes, torch
from bitsandbytes.functional import has_avx512bf16

print("torch", torch.__version__, "bitsandbytes", bitsandbytes.__version__, "AVX512-BF16", has_avx512bf16())
if not has_avx512bf16():
    raise SystemExit("this CPU has no AVX512-BF16, so nothing is repacked: nothing to show here")
torch.manual_seed(0)
layer = bitsandbytes.nn.Linear4bit(256, 256, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
layer.eval()
x = torch.randn(4, 256, requires_grad=True)
before = layer(x)
before.sum().backward()
print(f"gradient of the input before scoring: {x.grad.abs().sum():.3f}")
with torch.no_grad():
    layer(x.detach())
layer.train()
x.grad = None
after = layer(x)
after.sum().backward()
moved = ((after - before).abs().max() / before.abs().max()).item()
print(f"gradient after it: {x.grad}; the output differs by {moved:.2%}")
assert x.grad is None and moved > 1e-4
PY
"$folder/venv/bin/python" "$folder/probe.py"
# Output seen:
# torch 2.13.0+cpu bitsandbytes 0.50.2 AVX512-BF16 1
# gradient of the input before scoring: 436.453
# gradient after it: None; the output differs by 0.33%
