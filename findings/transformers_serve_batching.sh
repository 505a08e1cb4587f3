#!/usr/bin/env bash
# transformers 5.19.0, `transformers serve --continuous-batching`: the first request decides how all later ones are
# sampled, for as long as the server runs, and stop strings are ignored.
#
# One would have guessed: each request is sampled by its own temperature and ends at its own stop strings, as without the
# option. But the batch's manager is made at the first request, with that request's settings; of a later request only
# max_tokens and the end-of-sequence token reach it. Nothing is logged, and the status is 200.
#
# Whom it hurts: who serves several clients with one server. If the first asks with temperature 0, everybody gets greedy
# replies; if the first samples, an evaluation with temperature 0 is sampled. A client that cuts replies with `stop` gets
# all of max_tokens.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.19.0 numpy==2.4.6 \
  accelerate openai==3.57.0 fastapi==0.140.13 uvicorn==0.54.0 pydantic==2.14.3
cat > "$folder/probe.py" <<'PY'
import json, logging, os, sys, time, urllib.request, warnings
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
import torch, transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cli.serve import Serve

print("transformers", transformers.__version__, "torch", torch.__version__)
folder, port = sys.argv[1], int(sys.argv[2])
words = {f"w{i}": i for i in range(200)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
tokenizer.save_pretrained(folder)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=200, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                             num_attention_heads=2, bos_token_id=None, eos_token_id=None)).save_pretrained(folder)


def ask(**given):
    body = {"model": folder, "messages": [{"role": "user", "content": "w1 w2 w3"}], "max_tokens": 8, **given}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


Serve(force_model=folder, continuous_batching=True, attn_implementation="sdpa", device="cpu", dtype="float32", port=port,
      cb_num_blocks=64, cb_max_batch_tokens=64, log_level="error", non_blocking=True)
for _ in range(100):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
        break
    except OSError:
        time.sleep(0.2)
greedy = [ask(temperature=0) for _ in range(3)]
warm = [ask(temperature=2.0) for _ in range(3)]
print("temperature 0, asked first:", greedy)
print("temperature 2, asked after it:", warm)
stop = greedy[0].split()[1]
stopped = ask(temperature=0, stop=[stop])
print(f"stop {stop!r}:", stopped)
sys.stdout.flush()
os._exit(0 if set(warm) == set(greedy) and stopped == greedy[0] else 1)  # the server's threads would not end
PY
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/probe.py" "$folder/model" "$port" 2> "$folder/log" | grep -v INFO \
  || { tail -20 "$folder/log"; exit 1; }
# Output seen:
# transformers 5.19.0 torch 2.13.0+cpu
# temperature 0, asked first: ['w165 w68 w118 w65 w82 w40 w194 w39', (the same twice more)]
# temperature 2, asked after it: ['w165 w68 w118 w65 w82 w40 w194 w39', (the same twice more)]
# stop 'w68': w165 w68 w118 w65 w82 w40 w194 w39
