"""Ranks of one job do the same, whatever the store shows to each of them."""

import pytest

from rlhf_core.runtime.agreement import decided
from rlhf_core.store import open_store
from tests.rlhf_core.torchrun import run_ranks


@pytest.mark.slow
def test_ranks_between_which_a_result_is_committed_do_the_same(tmp_path):
    for late in ("0", "1"):
        folder = tmp_path / late
        store = open_store(str(folder / "store"))
        artifact = store.publish_derived(kind="model", files={"config.json": b"{}"})
        (folder / "store.txt").write_text(store.url)
        (folder / "late").write_text(late)
    files = [str(tmp_path / late / "job.json") for late in ("0", "1")]
    run_ranks(2, "tests.rlhf_core.runtime.ranks", *files)
    # as rank 0 saw it: it asked after the commit of the first job's result, and before the second's
    assert not list((tmp_path / "0").glob("ran-*"))
    assert len(list((tmp_path / "1").glob("ran-*"))) == 2
    for late in ("0", "1"):
        assert artifact.digest in (tmp_path / late / "result.json").read_text()


def test_rank_without_others_decides_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert decided(lambda: True, 1.0) is True and decided(lambda: False, 1.0) is False
