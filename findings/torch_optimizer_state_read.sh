#!/usr/bin/env bash
# torch 2.13.0: to READ the state of an optimizer that has not stepped yet, by get_optimizer_state_dict() or
# get_state_dict() of torch.distributed.checkpoint, changes the training that follows: Adam's first update is a quarter
# smaller.
#
# One would have guessed: a function named get leaves the optimizer as it is, or at worst gives it the zeros that it would
# begin with. It calls step() once, with gradients of zero and a learning rate of zero. The weights stay, but Adam's counter
# is 1 from then on, and the next update is corrected for the bias of a second one. SGD with dampening keeps only its part
# of the first gradient. Hooks of step() see a step that nobody took.
#
# Whom it hurts: who writes a checkpoint before the first step, or asks for the state as the form into which dcp.load()
# reads and then finds no checkpoint: the run is another one than without it, although nothing was loaded. What helps:
# optimizer.state.clear() between the reading and the first step.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict

def first_update(make, read=None, clear=False):
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    optimizer = make(model.parameters())
    hooked = []
    optimizer.register_step_post_hook(lambda *a: hooked.append(1))
    if read:
        read(model, optimizer)
    before, steps = model.weight.detach().clone(), len(hooked)
    if clear:
        optimizer.state.clear()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return (before - model.weight).abs().mean().item(), steps

print("torch", torch.__version__)
adam = lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0)
heavy = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.9)
found = {}
for name, make in (("AdamW", adam), ("SGD with dampening", heavy)):
    for how, read in (("not read", None), ("get_optimizer_state_dict", get_optimizer_state_dict),
                      ("get_state_dict", get_state_dict)):
        found[name, how], steps = first_update(make, read)
        print(f"{name:18}  first update {found[name, how]:.4f}  {how}; step() had run {steps} times before")
cleared, _ = first_update(adam, get_state_dict, clear=True)
print(f"AdamW               first update {cleared:.4f}  get_state_dict, then optimizer.state.clear()")
assert abs(found["AdamW", "not read"] - 0.1) < 1e-4 and abs(cleared - 0.1) < 1e-4
assert all(found["AdamW", how] < 0.08 for how in ("get_optimizer_state_dict", "get_state_dict"))
assert found["SGD with dampening", "get_state_dict"] < 0.5 * found["SGD with dampening", "not read"]
PY
"$folder/venv/bin/python" "$folder/probe.py"
