#!/usr/bin/env bash
# TRL 1.16.0, GRPOTrainer with loss_type="cispo": cispo_clip_ratio counts only tokens with a positive advantage, while the
# loss caps the weight of both kinds.
#
# One would have guessed: the metric is the share of tokens whose weight is capped at epsilon_high, as clip_ratio/region_mean is
# the share that PPO's clip stops. PPO's upper clip acts on positive advantages alone, and the condition is the same here; but
# CISPO's cap knows no sign. Tokens of bad replies whose ratio is four times the cap are capped, and counted as free.
#
# Whom it hurts: who chooses epsilon_high by the metric, or compares it with another library's. When most tokens that have
# become likely are of bad replies, which is when training goes wrong, it shows next to nothing.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check trl==1.16.0 torch==2.13.0 transformers==5.19.0 \
  accelerate==1.15.0 datasets==5.2.0 numpy==2.4.6
cat > "$folder/probe.py" <<'PY'
import logging, sys, warnings
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
import torch, transformers, trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1", pad_token="w2")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=2, bos_token_id=None, eos_token_id=1, pad_token_id=2))
trainer = GRPOTrainer(
    model=model, reward_funcs=lambda completions, **rest: [0.0] * len(completions), processing_class=tokenizer,
    train_dataset=Dataset.from_list([{"prompt": "w3 w4"}] * 4),
    args=GRPOConfig(output_dir=sys.argv[1], loss_type="cispo", epsilon_high=5.0, per_device_train_batch_size=4,
                    num_generations=4, report_to="none", use_cpu=True, bf16=False))
trainer.current_gradient_accumulation_steps = 1
model.train()
prompt, reply = torch.tensor([[3, 4]]), torch.tensor([[5, 6, 7, 8]])
now = model(torch.cat([prompt, reply], 1)).logits.float().log_softmax(-1)[:, 1:-1].gather(2, reply[..., None])[..., 0].detach()

def step(advantage, ratio):
    """The gradient's norm, and the metric, where each token is `ratio` times as likely as it was."""
    trainer._metrics["train"].clear()
    model.zero_grad()
    trainer._compute_loss(model, {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": reply,
        "completion_mask": torch.ones_like(reply), "advantages": torch.tensor([advantage]),
        "old_per_token_logps": now - torch.tensor(ratio).log(), "num_items_in_batch": torch.tensor(4.0)}).backward()
    return model.lm_head.weight.grad.norm().item(), trainer._metrics["train"]["cispo_clip_ratio"][0]

found = {}
for advantage in (1.0, -1.0):
    for ratio in (4.0, 20.0, 40.0):
        found[advantage, ratio] = norm, metric = step(advantage, ratio)
        print(f"advantage {advantage:4}, ratio {ratio:4}, cap 5: norm of the gradient {norm:.4f}, cispo_clip_ratio {metric}")
for advantage in (1.0, -1.0):  # 20 and 40 are capped at 5
    free, capped, more = (found[advantage, ratio][0] for ratio in (4.0, 20.0, 40.0))
    assert abs(capped - more) < 1e-3 and abs(capped - 5 / 4 * free) < 1e-3
assert found[1.0, 20.0][1] == 1.0 and found[-1.0, 20.0][1] == 0.0
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/probe.py" "$folder/out" 2>/dev/null
