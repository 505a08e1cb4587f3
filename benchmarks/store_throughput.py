"""How fast the store moves files, beside boto3's transfer manager on the same S3 server.

Usage: python benchmarks/store_throughput.py [--mib 1024] [--shards 8] [--repeats 3]

Starts a SeaweedFS server in a temporary folder and lets both move one file, and the same bytes as
shards, up and down. They take turns, each time in a fresh process that has made one small request
before the clock starts. Ours is `Store.publish` and `Store.fetch` whole: with the sha256 that names
a file, the verification of what was fetched, and the manifest. boto3's is its transfer manager with
its defaults. RSS is the peak over what the process had when the clock started.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_core.store.s3.seaweed import BUCKET, Seaweed
from rlhf_core.system.cpus import cpu_cores

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--mib", type=int, default=1024, help="size of the whole")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the server and the files lie")
    parser.add_argument("--one", nargs=2, metavar=("WHO", "DATA"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        who, data = given.one
        print(json.dumps((ours if who == "ours" else boto3s)(Path(data))))
        return
    with tempfile.TemporaryDirectory(prefix="bench-store-", dir=given.folder) as temporary:
        compare(Path(temporary), given.mib, given.shards, given.repeats)


RAW = argparse.RawDescriptionHelpFormatter


def compare(folder: Path, mib: int, shards: int, repeats: int) -> None:
    """Run everything and print the table."""
    print(f"load before: {os.getloadavg()[0]:.1f} on {cpu_cores()} cores", flush=True)
    sets = {"1 file": 1, f"{shards} shards": shards}
    for name, count in sets.items():
        make_files(folder / name, count, mib)
    server = Seaweed(folder / "server")
    server.start()
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    try:
        for repeat in range(repeats):
            for name in sets:
                # Whoever goes second may find the server busy with what the first one left.
                for who in ("ours", "boto3")[:: 1 if repeat % 2 else -1]:
                    result = in_a_child(server, who, folder / name)
                    found.setdefault((name, who), []).append(result)
                    print(f"  {repeat + 1}  {name:<9} {who:<6} {shown(result)}", flush=True)
    finally:
        server.kill()
    print(f"\nmedians of {repeats}, MiB/s for {mib} MiB ({sys.platform}, {cpu_cores()} cores)")
    print(f"{'':<10}{'':<7}{'ours':>8}{'boto3':>8}{'ratio':>8}{'our RSS':>10}{'its RSS':>9}")
    for name in sets:
        for way in ("up", "down"):
            mine, its = (
                {k: statistics.median(r[k] for r in found[name, who]) for k in (way, way + "_rss")}
                for who in ("ours", "boto3")
            )
            print(
                f"{name:<10}{way:<7}{mib / mine[way]:>8.0f}{mib / its[way]:>8.0f}"
                f"{its[way] / mine[way]:>8.2f}{mine[way + '_rss']:>6.0f} MiB"
                f"{its[way + '_rss']:>5.0f} MiB"
            )


def shown(result: dict[str, float]) -> str:
    return "   ".join(
        f"{way} {result[way]:5.2f} s, +{result[way + '_rss']:.0f} MiB" for way in ("up", "down")
    )


def make_files(folder: Path, count: int, mib: int) -> None:
    """Random bytes: nothing that a server could compress or find twice."""
    folder.mkdir()
    for number in range(count):
        with open(folder / f"model-{number:05}.safetensors", "wb") as file:
            for _ in range(mib // count):
                file.write(os.urandom(MIB))


def in_a_child(server: Seaweed, who: str, data: Path) -> dict[str, float]:
    home = data.parent / "home"
    done = subprocess.run(
        [sys.executable, __file__, "--one", who, str(data)],
        env={**os.environ, **server.client_environment, "RLHF_HOME": str(home)},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(move: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and MiB of RSS over the beginning at the highest."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory("VmRSS")
    began = time.perf_counter()
    move()
    return time.perf_counter() - began, memory("VmHWM") - before


def memory(name: str) -> float:
    line = next(
        row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name)
    )
    return float(line.split()[1]) / 1024


def ours(data: Path) -> dict[str, float]:
    """Publish a folder, and fetch it into a new one."""
    from rlhf_core.store import open_store

    place = uuid.uuid4().hex
    store = open_store(f"s3://{BUCKET}/{place}")
    store.check()
    published = []
    up = measured(lambda: published.append(store.publish(data, kind="model")))
    target = data.parent / f"fetched-{place}"
    down = measured(lambda: store.fetch(published[0].digest, target))
    clean(target)
    store.delete(published[0].digest, blobs=True)
    return {"up": up[0], "up_rss": up[1], "down": down[0], "down_rss": down[1]}


def boto3s(data: Path) -> dict[str, float]:
    """The same with boto3's transfer manager, all files at once."""
    import boto3
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    client = boto3.client("s3", endpoint_url=os.environ["RLHF_STORE_ENDPOINT"],
                          region_name="us-east-1")  # fmt: skip
    client.head_bucket(Bucket=BUCKET)
    place = uuid.uuid4().hex
    files = {f"{place}/{path.name}": path for path in sorted(data.iterdir())}
    target = data.parent / f"fetched-{place}"
    target.mkdir()

    def up() -> None:
        with create_transfer_manager(client, TransferConfig()) as manager:
            for future in [manager.upload(str(p), BUCKET, k) for k, p in files.items()]:
                future.result()

    def down() -> None:
        with create_transfer_manager(client, TransferConfig()) as manager:
            wanted = [manager.download(BUCKET, k, str(target / p.name)) for k, p in files.items()]
            for future in wanted:
                future.result()

    sent, fetched = measured(up), measured(down)
    clean(target)
    for key in files:
        client.delete_object(Bucket=BUCKET, Key=key)
    return {"up": sent[0], "up_rss": sent[1], "down": fetched[0], "down_rss": fetched[1]}


def clean(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


if __name__ == "__main__":
    main()
