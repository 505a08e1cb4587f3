"""One set of inputs for all tests in this folder; each test has a copy of their store."""

import pytest

from tests.faults.stage import PLACEMENT, Place, make_inputs, make_job


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a store, and the digests of what is in it."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_HOME", str(folder / "home"))
        return folder, make_inputs(folder)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """What this process fetches goes where the test's own files are."""
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def inputs(base):
    return base[1]


@pytest.fixture(scope="session")
def undisturbed(base, inputs, tmp_path_factory):
    """algorithm -> place and result of a run that nothing happened to."""
    place = Place(base[0], tmp_path_factory.mktemp("undisturbed") / "place")
    jobs = {name: make_job(inputs, name, where) for name, where in PLACEMENT.items()}
    place.run([jobs["sft"], jobs["ppo"]])
    place.run(jobs["reward"])
    return {name: (place, place.result(job)) for name, job in jobs.items()}


@pytest.fixture
def place(base, tmp_path):
    return Place(base[0], tmp_path / "place")
