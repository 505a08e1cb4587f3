"""One set of inputs for all tests in this folder; each test runs its stage in a copy of the store."""

import pytest

from tests.faults.stage import Place, make_inputs


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a store, and the digests of what is in it."""
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_HOME", str(folder / "home"))
        return folder, make_inputs(folder)


@pytest.fixture(scope="session")
def inputs(base):
    return base[1]


@pytest.fixture
def place(base, tmp_path):
    return Place(base[0], tmp_path / "place")
