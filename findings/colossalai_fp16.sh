#!/usr/bin/env bash
# ColossalAI 0.5.0, precision fp16: what its optimizers tell the training loop.
#
# One would have guessed:
#   1. LowLevelZeroPlugin's loss scale starts where torch's GradScaler does, at 2^16.
#      It starts at 2^32. The first updates overflow and are skipped; step() returns as usual and
#      prints nothing, while the learning-rate schedule and the step counter go on.
#   2. get_grad_norm() is the norm of the gradients. It is the norm times the loss scale.
#   3. With TorchDDPPlugin and mixed_precision="fp16", clip_grad_by_norm() returns the norm, as it
#      does without fp16 and as torch's clip_grad_norm_ does. It returns None.
#
# Whom it hurts: who trains on GPUs without bf16 (V100, T4) and logs the gradient norm, stops at a
# norm that is not finite, or counts warm-up steps. A short run can be over before its first update.
#
# Runs on a CPU: ColossalAI's ZeRO asserts an accelerator named "cuda" or "npu" and asks it for
# streams, so the script gives it one that answers.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.19.0 \
  peft==0.21.2 accelerate==1.15.0 bitsandbytes==0.50.2 einops==0.8.2 galore-torch==1.0 \
  sentencepiece==0.2.3 rich==15.0.0 psutil==7.2.2 numpy==2.4.6
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps colossalai==0.5.0
cat > "$folder/probe.py" <<'PY'
import contextlib, os, warnings
warnings.filterwarnings("ignore")
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
import colossalai, torch, torch.distributed as dist
from torch import nn
from colossalai.accelerator.api import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator

class Stream:
    def wait_stream(self, other): ...
    def synchronize(self): ...

class Pretended(CpuAccelerator):
    name = "npu"
    def __init__(self): self._name, self._communication_backend, self._accelerator = "npu", "gloo", None
    def synchronize(self, device=None): ...
    def current_device(self): return 0
    def get_current_device(self): return torch.device("cpu")
    def device_count(self): return 1
    def Stream(self, *a, **k): return Stream()
    current_stream = default_stream = Stream
    def stream(self, s): return contextlib.nullcontext()

set_accelerator(Pretended())
dist.init_process_group("gloo")
from colossalai.booster import Booster
from colossalai.booster.plugin import LowLevelZeroPlugin, TorchDDPPlugin

def boosted(plugin, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return Booster(plugin=plugin, **options).boost(model, torch.optim.SGD(model.parameters(), lr=0.01))[:2]

print("torch", torch.__version__, "colossalai", colossalai.__version__)
x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
model, optimizer = boosted(LowLevelZeroPlugin(stage=1, precision="fp16", overlap_communication=False, verbose=False))
scale = optimizer.mixed_precision_mixin.loss_scale
first = next(model.parameters()).detach().clone()
skipped = 0
while torch.equal(first, next(model.parameters())):
    optimizer.backward(model(x).float().square().mean()); optimizer.step(); optimizer.zero_grad()
    skipped += 1
    assert skipped < 100
skipped -= 1
now = optimizer.mixed_precision_mixin.loss_scale
told = float(optimizer.get_grad_norm())
print(f"1. loss scale at the start 2^{torch.tensor(scale).log2():.0f}; updates skipped without a word: {skipped}")
print(f"2. get_grad_norm() {told:.0f}; divided by the loss scale {told / now:.3f}")
ddp, plain = boosted(TorchDDPPlugin(), mixed_precision="fp16")
for parameter in ddp.parameters():
    parameter.grad = torch.ones_like(parameter)
wanted = nn.utils.clip_grad_norm_(ddp.parameters(), 1e9)
returned = plain.clip_grad_by_norm(1e9)
print(f"3. clip_grad_by_norm() {returned}; torch's clip_grad_norm_ {float(wanted):.3f}")
assert scale == 2.0**32 and skipped > 10 and told > 1000 and returned is None
PY
"$folder/venv/bin/python" "$folder/probe.py"
# Output seen:
# torch 2.13.0+cpu colossalai 0.5.0
# 1. loss scale at the start 2^32; updates skipped without a word: 18
# 2. get_grad_norm() 50606; divided by the loss scale 1.544
# 3. clip_grad_by_norm() None; torch's clip_grad_norm_ 2.236
