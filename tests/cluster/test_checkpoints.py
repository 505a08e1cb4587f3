"""The state that some ranks save is bitwise the one that another number of ranks restores, also
under another strategy."""

import json

import pytest

from tests.cluster.checkpoint_ranks import CASES, FROM_ANOTHER
from tests.rlhf_core.store.seaweed import BUCKET, KEYS, SeaweedServer
from tests.rlhf_core.torchrun import run_ranks

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

CHANGES = ((2, 3), (3, 2), (4, 1))  # of the number of ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What was saved and loaded: name -> sha256 of the whole state. The store is an S3 server."""
    folder = tmp_path_factory.mktemp("checkpoints")
    server = SeaweedServer(folder / "server")
    server.start()
    env = {**KEYS, "RLHF_STORE_ENDPOINT": server.endpoint, "RLHF_STORE": f"s3://{BUCKET}/c"}
    try:
        for before, after in CHANGES:
            for what, ranks in (("save", before), ("load", after)):
                arguments = (str(folder), what, str(before))
                run_ranks(ranks, "tests.cluster.checkpoint_ranks", *arguments, env=env)
    finally:
        server.kill()
    files = folder.glob("*-by-*.json")
    return {name: sha for path in files for name, sha in json.loads(path.read_text()).items()}


@pytest.mark.parametrize(("before", "after"), CHANGES)
@pytest.mark.parametrize("form", ("", "-whole"))
def test_another_number_of_ranks_restores_the_same_bits(found, before, after, form):
    cases = [(kind, kind) for kind, _ in CASES] + FROM_ANOTHER
    for saved, kind in cases:
        restored = found[f"{saved}-{before}{form} as {kind}-{after}"]
        assert restored == found[f"{saved}-{before}"], (saved, kind)
    assert len({found[f"{kind}-{before}"] for kind, _ in CASES}) > 1, "a sha256 tells states apart"
