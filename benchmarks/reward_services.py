"""Scores of a judge that are asked for as replies finish, beside those asked for after the rollout.

    python -m benchmarks.reward_services [--replies 64] [--latency 1.0] [--parallel 8]

A tiny random model samples replies with the decode loop of the stages; a stand-in judge answers
over real HTTP on loopback after `latency` seconds, `parallel` at once. Three ways, in turns within
one run, `rounds` times each:

    none      the rollout alone
    during    the judge is asked by `on_finished`, the scores are read after the rollout
    after     the same questions, asked when the rollout is over

Decoding is slowed down by sleeping before each pass, as if the model were large (it then costs no
time of the judge's on the same cores), so that the rollout takes `seconds`. Replies end by an
end-of-turn token with a fixed probability for each token, or at the limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_core.jobs.reward_services import JudgeReward
from rlhf_core.rewards.services import Services
from rlhf_core.rollout.generate import generate
from rlhf_core.training.online.service_rewards import asking, service_scores

VOCABULARY = 512


class Judge:
    """A chat-completions endpoint on loopback that rates every reply by its number of words."""

    def __init__(self, latency: float) -> None:
        self.requests = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                self.requests += 1
                time.sleep(latency)
                words = len(body["messages"][0]["content"].split())
                text = f"[[{1 + words % 10}]]"
                data = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                handler.wfile.write(data)

            def log_message(handler, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Words:
    """A tokenizer whose text is the ids."""

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


class OneRank:
    """The group of a single process."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def in_order(self, mine: Any) -> list[Any]:
        return [value for _, value in sorted(mine)]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def one(way: str, model: Any, judge: Judge, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Seconds until the scores of a rollout are there, and of the rollout itself."""
    prompts = [[5 + i % 400, 7] for i in range(args.replies)]
    rows = [
        {"prompt": json.dumps([{"role": "user", "content": str(i)}])} for i in range(len(prompts))
    ]
    reward = JudgeReward(url=judge.url, model="stand-in", parallel=args.parallel)
    services = Services([reward])
    ends = set(range(int(VOCABULARY * args.ends)))
    pause = args.seconds / args.tokens
    began = time.perf_counter()
    rollout = generate(
        model, prompts, max_new_tokens=args.tokens, eos_ids=ends, pad_id=0, batch_size=len(prompts),
        row_seeds=[seed * 1000 + i for i in range(len(prompts))],
        before_pass=lambda: time.sleep(pause),
        on_finished=asking(services, Words(), rows) if way == "during" else None,
    )  # fmt: skip
    sampled = time.perf_counter() - began
    replies = [
        ids[real].tolist()
        for ids, real in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]
    scores = None
    if way != "none":
        found = service_scores(
            services, OneRank(), Words(), rows, replies, rollout.finished.tolist()  # type: ignore[arg-type]
        )  # fmt: skip
        scores = found.scores["judge"].tolist()
    total = time.perf_counter() - began
    services.close()
    return {"rollout": sampled, "total": total, "scores": scores}


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--replies", type=int, default=64)
    parser.add_argument("--latency", type=float, default=1.0, help="seconds")
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="limit of a reply")
    parser.add_argument("--ends", type=float, default=0.012, help="probability for each token")
    parser.add_argument("--seconds", type=float, default=10.0, help="of decoding `tokens` steps")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, judge = tiny_model(), Judge(args.latency)
    one("none", model, judge, argparse.Namespace(**{**vars(args), "seconds": 0.0}), 0)  # warm up
    found: dict[str, list[dict[str, Any]]] = {"none": [], "during": [], "after": []}
    for seed in range(1, args.rounds + 1):
        for way, runs in found.items():
            runs.append(one(way, model, judge, args, seed))
        assert found["during"][-1]["scores"] == found["after"][-1]["scores"]
    middle = {
        way: {name: statistics.median(run[name] for run in runs) for name in ("rollout", "total")}
        for way, runs in found.items()
    }
    for way, numbers in middle.items():
        print(f"{way:8} rollout {numbers['rollout']:6.2f} s   total {numbers['total']:6.2f} s")
    alone, during, after = (middle[way]["total"] for way in ("none", "during", "after"))
    print(f"during, less the last reply's wait ({args.latency:g} s), over none: "
          f"{(during - args.latency) / alone:.2f}")  # fmt: skip
    print(f"during over after: {during / after:.2f}")
    print(f"what the judge adds, during over after: {(during - alone) / (after - alone):.2f}")


if __name__ == "__main__":
    main()
