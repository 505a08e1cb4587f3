"""The one mechanism: installs and removes, asks once, falls back, says so, can be switched off."""

import logging

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from rlhf_core.errors import ModelError
from rlhf_core.nn import fast_paths, probe_model
from rlhf_core.nn.fast_paths import FastPath, Unsuited, keep_in_step, patched, switched
from tests.rlhf_core.nn.test_response_logprobs import make_model


def path(difference: float = 0.0, error: Exception | None = None) -> FastPath:
    """A fast path whose numbers are off by a share of the largest, or whose trial raises."""

    def trial(model: nn.Module):
        trial.asked.append(model)
        if error is not None:
            raise error
        weight = model.weight.detach()
        return [(weight + difference * weight.abs().max(), weight)]

    trial.asked = []
    found = FastPath("test path", "time", trial)
    found.asked = trial.asked
    return found


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4).to(dtype)


# ------------------------------------------------------------------------------ installation


def test_patches_are_removed_to_the_last_one_also_after_an_exception() -> None:
    layer, config = nn.Linear(2, 2), LlamaConfig()
    layer.own = 1
    with pytest.raises(KeyError), patched(
        (layer, "forward", lambda x: x + 1), (layer, "own", 2), (layer, "other", 3),
        (config, "_attn_implementation", "rlhf_unpadded"), (layer.weight, "requires_grad", False),
    ):  # fmt: skip
        assert layer(torch.zeros(2)).tolist() == [1, 1]
        assert (layer.own, layer.other) == (2, 3)
        assert config._attn_implementation == "rlhf_unpadded" and not layer.weight.requires_grad
        raise KeyError
    assert "forward" not in vars(layer) and not hasattr(layer, "other")
    assert layer.own == 1 and config._attn_implementation is None and layer.weight.requires_grad


def test_patches_within_patches_come_off_in_their_order() -> None:
    layer = nn.Linear(2, 2)
    with patched((layer, "forward", "outer")):
        with patched((layer, "forward", "inner")):
            assert layer.forward == "inner"
        assert layer.forward == "outer"
    assert "forward" not in vars(layer)


# ------------------------------------------------------------------------------------ trials


def test_a_model_is_asked_once_and_another_one_anew(caplog) -> None:
    good, first, second = path(), linear(), linear()
    assert [good.works(first), good.works(first), good.works(second)] == [True] * 3
    assert good.asked == [first, second]
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("dtype", "small", "large"),
    [
        (torch.float32, 5e-6, 3e-5),
        (torch.float64, 5e-6, 3e-5),
        (torch.bfloat16, 0.02, 0.1),
        (torch.float16, 2e-3, 2e-2),
    ],
)
def test_numbers_may_differ_by_the_precisions_rounding(dtype, small, large, caplog) -> None:
    assert path(small).works(linear(dtype))
    assert not path(large).works(linear(dtype))
    assert "its numbers differ by" in caplog.text and "Lost: time" in caplog.text


def test_numbers_that_are_off_everywhere_but_small_beside_the_largest_are_refused() -> None:
    """As where a model has a few very large activations."""
    want = torch.full((100,), 0.01, dtype=torch.bfloat16)
    want[0] = 1.0
    found = want.clone()
    found[1:] = 0.0
    assert float((found - want).abs().max()) < probe_model.tolerance(want)
    assert probe_model.difference(found, want) > probe_model.tolerance(want)
    assert not probe_model.difference(want * torch.nan, want) <= probe_model.tolerance(want)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("no kernel"), "RuntimeError: no kernel"),
        (IndexError("too long"), "IndexError: too long"),
        (Unsuited("it has a window"), "(it has a window)"),
    ],
)
def test_why_a_trial_failed_is_said_once_per_kind_of_model(error, text, caplog) -> None:
    bad = path(error=error)
    assert not bad.works(linear()) and not bad.works(linear())
    assert len(caplog.records) == 1
    record = caplog.records[0]
    assert (record.name, record.levelno) == ("rlhf_core.fast_paths", logging.WARNING)
    assert text in record.message and "Linear: test path" in record.message
    assert "Lost: time" in record.message


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_lack_of_memory_is_no_answer(error) -> None:
    bad = path(error=error)
    with pytest.raises(type(error)):
        bad.works(linear())


def test_trial_rows_are_padded_and_fit_the_models_positions() -> None:
    model = make_model("llama")  # 64 positions
    ids, mask = probe_model.trial_rows(model)
    assert ids.shape == (3, 64) and mask.sum(1).tolist() == [64, 36, 12]
    assert not (mask[:, 1:] > mask[:, :-1]).any()
    left = probe_model.trial_rows(model, left=True)[1]
    assert torch.equal(left, mask.flip(1))
    model.config.max_position_embeddings = 2048
    assert probe_model.trial_rows(model)[1].sum(1).tolist() == [128, 72, 24]
    assert ids.max() < model.config.vocab_size


# ----------------------------------------------------------------------------------- running


def failing(error: Exception):
    def fast() -> Tensor:
        raise error

    return fast


def test_a_fast_path_that_raises_falls_back_and_stays_off_for_this_model(caplog) -> None:
    good, model, other = path(), linear(), linear()
    assert good.run(model, lambda: "fast", lambda: "plain") == "fast"
    assert good.run(model, failing(RuntimeError("illegal shape")), lambda: "plain") == "plain"
    assert "RuntimeError: illegal shape" in caplog.text
    assert good.run(model, lambda: "fast", lambda: "plain") == "plain"
    assert good.run(other, lambda: "fast", lambda: "plain") == "fast"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.distributed.DistBackendError("NCCL error"),
        ModelError("the user's fault"),
        KeyboardInterrupt(),
    ],
)
def test_what_the_plain_code_could_not_mend_is_raised(error) -> None:
    good, model = path(), linear()
    with pytest.raises(type(error)):
        good.run(model, failing(error), lambda: pytest.fail("the plain code ran"))
    assert good.works(model)


def test_a_model_that_other_ranks_run_along_does_not_fall_back() -> None:
    good, model = path(), linear()
    keep_in_step(model)
    assert good.run(model, lambda: "fast", lambda: "plain") == "fast"
    with pytest.raises(RuntimeError, match="illegal shape") as raised:
        good.run(
            model, failing(RuntimeError("illegal shape")), lambda: pytest.fail("a second pass")
        )
    assert "resources.fast_paths false" in raised.value.__notes__[0]


def test_an_answer_that_is_forgotten_is_found_again() -> None:
    good, model, other = path(), linear(), linear()
    assert good.works(model) and good.works(other) and good.works(model)
    good.forget(model)
    assert good.works(model) and good.works(other)
    assert good.asked == [model, other, model]


def test_an_error_of_the_plain_code_is_not_put_on_the_fast_path(caplog) -> None:
    good, model = path(), linear()
    with pytest.raises(ValueError, match="broken model"):
        good.run(model, failing(RuntimeError("x")), failing(ValueError("broken model")))
    assert good.works(model) and caplog.text == ""


def test_switched_off_nothing_is_tried_or_run_and_afterwards_all_is_as_before() -> None:
    good, model = path(), linear()
    with pytest.raises(KeyError), switched(False):
        assert not good.works(model) and good.asked == []
        assert good.run(model, lambda: "fast", lambda: "plain") == "plain"
        with switched(True):
            assert good.works(model)
        raise KeyError
    assert fast_paths.switched_on() and good.works(model)
