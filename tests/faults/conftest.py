"""One set of inputs for all tests in this folder; each test has a copy of their store."""

import pytest

from tests.faults.stage import Place, make_inputs, make_job


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
    """(algorithm, ranks, strategy) -> place and result of a run that nothing happened to."""
    found = {}

    def run(algorithm, ranks, strategy):
        case = (algorithm, ranks, strategy)
        if case not in found:
            place = Place(base[0], tmp_path_factory.mktemp("undisturbed") / "place")
            job = make_job(inputs, algorithm, {"ranks": ranks, "strategy": strategy})
            place.run(job)
            found[case] = (place, place.result(job))
        return found[case]

    return run


@pytest.fixture
def place(base, tmp_path):
    return Place(base[0], tmp_path / "place")
