"""How many requests `rlhf serve` answers with transformers, and how long they take.

Usage: python benchmarks/serving_load.py [--clients 50] [--rounds 2] [--tokens 400] [--url URL]

Starts the server for a tiny random model in a temporary folder, or asks the one at URL. Each client
sends one request after another, of its own prompt. To measure another commit, run this file in the
folder of a checkout of it, with PYTHONPATH=. there.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from rlhf_core.system.cpus import cpu_cores
from rlhf_core.system.ports import free_ports

START_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=50, help="requests at a time")
    parser.add_argument("--rounds", type=int, default=2, help="requests of each client")
    parser.add_argument("--tokens", type=int, default=400, help="longest reply")
    parser.add_argument("--url", help="of a server that runs already, without /v1")
    given = parser.parse_args()
    if given.url:
        measure(given.url, given.clients, given.rounds, given.tokens, None)
        return
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as folder:
        process, url = start(Path(folder))
        try:
            measure(url, given.clients, given.rounds, given.tokens, psutil.Process(process.pid))
        finally:
            process.kill()
            process.wait()


def start(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The server's process and URL, once it answers."""
    from rlhf_core.jobs import ImportModelJob
    from rlhf_core.runtime.context import StageContext
    from rlhf_core.stages.import_model import run
    from rlhf_core.store import open_store

    store, work = open_store(f"file://{folder}/store"), folder / "work"
    work.mkdir()
    job = ImportModelJob(source="random:llama")
    artifact = run(job, StageContext(store=store, key=job.key(), folder=work))
    port = free_ports(1)[0]
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli.main", "serve", artifact.digest, "--engine",
         "transformers", "--port", str(port), "--store", f"{folder}/store"],
        env={**os.environ, "RLHF_HOME": str(folder / "home")},
    )  # fmt: skip
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return process, url
        except httpx.HTTPError:
            time.sleep(0.2)
    process.kill()
    raise SystemExit("the server does not answer")


def measure(
    url: str, clients: int, rounds: int, tokens: int, server: psutil.Process | None
) -> None:
    """Run the clients and print what they found."""
    print(f"load before: {os.getloadavg()[0]:.1f} on {cpu_cores()} cores", flush=True)
    asyncio.run(load(url, min(4, clients), 1, 8))  # warm
    before, begun = used(server), time.monotonic()
    found = asyncio.run(load(url, clients, rounds, tokens))
    wall, processor = time.monotonic() - begun, used(server) - before
    seconds = sorted(second for second, _ in found)
    replied = sum(count for _, count in found)
    median, p95 = statistics.median(seconds), seconds[int(0.95 * len(seconds))]
    print(
        f"{len(found)} requests of {clients} clients: {len(found) / wall:.2f} requests/s, "
        f"{replied / wall:,.0f} tokens/s, {replied / len(found):.0f} tokens a reply; "
        f"median {median:.2f} s, p95 {p95:.2f} s ({p95 / median:.2f} times); "
        f"server's processor time {processor:.1f} s, {1000 * processor / replied:.2f} ms a token"
    )


def used(server: psutil.Process | None) -> float:
    """Processor seconds of the server so far; 0 for one that somebody else has started."""
    if server is None:
        return 0.0
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return sum(time.user + time.system for time in times)


async def load(url: str, clients: int, rounds: int, tokens: int) -> list[tuple[float, int]]:
    """Seconds and tokens of each request."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http:

        async def one(client: int) -> list[tuple[float, int]]:
            found = []
            for number in range(rounds):
                text = f"Client {client} asks question {number}: " + "why " * (client % 10)
                body: dict[str, Any] = {
                    "messages": [{"role": "user", "content": text}], "max_tokens": tokens,
                }  # fmt: skip
                begun = time.monotonic()
                answer = await http.post("/v1/chat/completions", json=body)
                answer.raise_for_status()
                usage = answer.json()["usage"]["completion_tokens"]
                found.append((time.monotonic() - begun, usage))
            return found

        return [one for some in await asyncio.gather(*map(one, range(clients))) for one in some]


if __name__ == "__main__":
    main()
