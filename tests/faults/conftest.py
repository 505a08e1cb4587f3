"""One set of inputs for all tests in this folder; each test has a copy of their store."""

import pytest

from tests.faults.stage import PLACEMENT, Place, make_inputs, make_job


@pytest.fixture(scope="session")
def base(once):
    """A folder with a store, and the digests of what is in it."""

    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RLHF_HOME", str(folder / "home"))
            return make_inputs(folder)

    return once("faults", make)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """What this process fetches goes where the test's own files are."""
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def inputs(base):
    return base[1]


@pytest.fixture(scope="session")
def undisturbed(base, inputs, once, tmp_path_factory):
    """algorithm -> place and result of a run that nothing happened to."""
    jobs = {name: make_job(inputs, name, where) for name, where in PLACEMENT.items()}

    def make(folder):
        place = Place(base[0], folder / "place")
        place.run([jobs["sft"], jobs["ppo"]])
        place.run(jobs["reward"])
        for job in jobs.values():
            place.result(job)  # says what went wrong
        return place.url

    _, url = once("undisturbed", make)
    place = Place(base[0], tmp_path_factory.mktemp("undisturbed") / "place", url)
    return {name: (place, place.result(job)) for name, job in jobs.items()}


@pytest.fixture
def place(base, tmp_path):
    return Place(base[0], tmp_path / "place")
