"""A tiny policy and a few preference pairs."""

import pytest

from rlhf_core.data.dataset.reading import Rows
from rlhf_core.data.dataset.writer import write_dataset
from rlhf_core.models.random_model import make_model, make_tokenizer
from rlhf_core.nn.modules import Policy
from tests.rlhf_core.training.alone import PAIRS


@pytest.fixture(scope="module")
def policy():
    return Policy(make_model("llama", make_tokenizer(), seed=0).eval())


@pytest.fixture
def pairs(tmp_path):
    rows = [row | {"prompt": "[]", "chosen": "", "rejected": "", "row": i}
            for i, row in enumerate(PAIRS)]  # fmt: skip
    write_dataset(tmp_path, "preference", {"train": rows}, {"source": "test"})
    return Rows(tmp_path, "train")
