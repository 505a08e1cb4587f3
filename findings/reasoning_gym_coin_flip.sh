#!/usr/bin/env bash
# reasoning-gym 0.1.25: the verifier of the task coin_flip gives the reply "0" full marks, whatever the probability is.
#
# One would have guessed: a probability is right within its tolerance of 0.0001, and a wrong one gets less than 1. But a wrong
# number gets the part of its digits that begin like the answer's, divided by the length of the SHORTER of the two. Every
# probability below 1 begins with "0", so "0" is all of it; "0.1" is full marks for 0.109375 and for 0.171875.
#
# Whom it hurts: who trains on the task: a policy that answers 0 has the reward of one that computes, and a group in which
# all do has no advantage left to learn from. An evaluation by these scores counts it as solved.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check reasoning-gym==0.1.25 numpy==2.4.6 sympy==1.14.0
cat > "$folder/probe.py" <<'PY'
import importlib.metadata, warnings
warnings.filterwarnings("ignore")
import reasoning_gym

data = reasoning_gym.create_dataset("coin_flip", size=200, seed=7)
entries = [data[i] for i in range(200)]
wrong = [entry for entry in entries if float(entry["answer"]) > 0.001 and float(entry["answer"]) < 0.999]
print("reasoning-gym", importlib.metadata.version("reasoning-gym"), "- coin_flip, answers such as",
      ", ".join(entry["answer"] for entry in wrong[:4]))
share = {}
for reply in ("0", "0.", "0.5", "1"):
    scores = [data.score_answer(reply, e) for e in wrong if abs(float(reply) - float(e["answer"])) > 0.001]
    share[reply] = sum(score == 1.0 for score in scores) / len(scores)
    print(f"the wrong reply {reply!r:6} has full marks for {share[reply]:4.0%} of {len(scores)} questions")
first = [data.score_answer(entry["answer"][:3], entry) for entry in wrong if len(entry["answer"]) > 3]
print(f"the answer's first digit alone ('0.1' for 0.109375): {sum(s == 1.0 for s in first)} of {len(first)}")
assert share["0"] == 1.0 and share["1"] == 0.0 and all(score == 1.0 for score in first)
PY
"$folder/venv/bin/python" "$folder/probe.py" 2> /dev/null
