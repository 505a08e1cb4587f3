"""A full forward pass over prompt and response, and transformers' own generate, are the oracles."""

import math

import pytest
import torch
from torch import nn

from rlhf_core.nn.response_logprobs import response_logprobs
from rlhf_core.rollout import generate
from rlhf_core.rollout.finished import FinishedReply
from rlhf_core.rollout.sampling import make_row_seeds
from tests.rlhf_core.nn.test_response_logprobs import V, make_model

PROMPTS = [[5, 9, 11], [7], [30, 31, 32, 33, 34, 35], [8, 8], [64, 3, 12, 40]]
SEEDS = [11, 12, 13, 14, 15]
EOS = set(range(10, 20))  # about one token in seven ends a row
NEVER: set[int] = {V + 100}


def sample(model: nn.Module, prompts: list[list[int]], **options: object) -> generate.Rollout:
    settings: dict = {"max_new_tokens": 12, "eos_ids": EOS, "pad_id": 0, "temperature": 1.0}
    if "row_seeds" not in options and "uniforms" not in options and "greedy" not in options:
        settings["row_seeds"] = SEEDS[: len(prompts)]
    return generate.generate(model, prompts, **(settings | options))


def flat_model(name: str = "llama") -> nn.Module:
    """A model whose distributions are broad, so that many tokens are possible."""
    model = make_model(name)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(0.5)
    return model


# ------------------------------------------------------------------------------ log-probabilities
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "gpt2", "opt", "bloom", "cohere", "gemma2", "granite"]
)
def test_logprobs_equal_those_of_a_full_forward_pass(name: str, temperature: float) -> None:
    model = flat_model(name)
    got = sample(model, PROMPTS, temperature=temperature, batch_size=3)
    assert got.response_mask.sum() > 5
    for i, prompt in enumerate(PROMPTS):
        count = int(got.response_mask[i].sum())
        row = torch.tensor([[*prompt, *got.response_ids[i, :count].tolist()]])
        with torch.no_grad():
            full = torch.log_softmax(model(input_ids=row).logits[0] / temperature, dim=-1)
        want = full[len(prompt) - 1 : -1].gather(1, row[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(got.logprobs[i, :count], want, atol=1e-4, rtol=1e-4)
        assert not got.logprobs[i, count:].any()


def test_logprobs_equal_response_logprobs_of_the_padded_batch() -> None:
    model = flat_model()
    got = sample(model, PROMPTS, temperature=0.8)
    width = max(map(len, PROMPTS))
    prompts = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    ids = torch.cat([prompts, got.response_ids], dim=1)
    attention = torch.cat([real, got.response_mask.long()], dim=1)
    with torch.no_grad():
        want = response_logprobs(model, ids, attention, None, got.response_mask, 0.8)
    torch.testing.assert_close(got.logprobs, want, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------- handed out when they end
def taken(rollout: generate.Rollout, row: int) -> FinishedReply:
    """A row of the result as it is handed out."""
    real = rollout.response_mask[row]
    ids, logprobs = rollout.response_ids[row][real], rollout.logprobs[row][real]
    return FinishedReply(row, ids.tolist(), logprobs.tolist(), bool(rollout.finished[row]))


@pytest.mark.parametrize("batch_size", [5, 2])
def test_replies_are_handed_out_by_the_step_in_which_they_end(batch_size: int) -> None:
    passes, found = [], []
    got = sample(
        flat_model(), PROMPTS, max_new_tokens=5, batch_size=batch_size,
        before_pass=lambda: passes.append(1),
        on_finished=lambda replies: found.append((len(passes), replies)),
    )  # fmt: skip
    plain = sample(flat_model(), PROMPTS, max_new_tokens=5, batch_size=batch_size)
    assert torch.equal(got.response_ids, plain.response_ids)
    replies = [reply for _, some in found for reply in some]
    assert sorted(replies) == [taken(got, row) for row in range(len(PROMPTS))]
    assert {reply.finished for reply in replies} == {True, False}  # at the limit as well
    lengths = [len(reply.ids) for reply in replies]
    if batch_size == len(PROMPTS):  # a pass for each token
        assert all(passes == len(reply.ids) for passes, some in found for reply in some)
        assert len(found) == len(set(lengths)) > 1 and lengths == sorted(lengths)


# --------------------------------------------------------------------------------- independence
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
def test_a_row_does_not_depend_on_the_batch_it_sits_in(name: str) -> None:
    model = flat_model(name)
    whole = sample(model, PROMPTS)
    assert int(whole.finished.sum()) > 0
    lengths = whole.response_mask.sum(1)
    assert lengths.min() < lengths.max()  # rows left the batch at different steps
    for size in (1, 2, 4):
        other = sample(model, PROMPTS, batch_size=size)
        assert torch.equal(other.response_ids, whole.response_ids)
        torch.testing.assert_close(other.logprobs, whole.logprobs, atol=1e-5, rtol=1e-4)
    order = [3, 1, 4, 0, 2]  # and the result follows the order of the prompts
    other = sample(model, [PROMPTS[i] for i in order], row_seeds=[SEEDS[i] for i in order])
    assert torch.equal(other.response_ids, whole.response_ids[order])
    assert torch.equal(other.finished, whole.finished[order])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "gemma2"])
def test_a_prompt_that_is_there_several_times_is_read_once(name: str) -> None:
    """Against the same rows alone; some of them end early."""
    model = flat_model(name)
    prompts = [PROMPTS[i] for i in (2, 0, 2, 1, 2, 0)]
    seeds = list(range(20, 26))
    read: list[tuple[int, ...]] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: read.append(tuple(output.shape[:2]))
    )
    found = sample(model, prompts, row_seeds=seeds)
    hook.remove()
    assert (3, 6) in read and (6, 6) not in read  # prompts, of which the longest has six tokens
    assert (6, 1) in read  # and then a token for each row
    for i, prompt in enumerate(prompts):
        alone = sample(model, [prompt], row_seeds=[seeds[i]])
        assert torch.equal(found.response_ids[i], alone.response_ids[0])
        assert torch.equal(found.response_mask[i], alone.response_mask[0])
        torch.testing.assert_close(found.logprobs[i], alone.logprobs[0], atol=1e-4, rtol=1e-4)
    assert len({tuple(row) for row in found.response_ids.tolist()}) == 6


def test_dropping_a_finished_row_changes_no_other() -> None:
    model = flat_model()
    free = sample(model, PROMPTS, eos_ids=NEVER)
    assert free.response_mask.all() and not free.finished.any()
    # end row 0 early: its third token becomes an end-of-turn token
    stop = int(free.response_ids[0, 2])
    cut = sample(model, PROMPTS, eos_ids={stop})
    for i in range(len(PROMPTS)):
        tokens = free.response_ids[i].tolist()
        count = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        assert cut.response_ids[i, :count].tolist() == tokens[:count]
        assert cut.response_mask[i].tolist() == [True] * count + [False] * (12 - count)
        assert bool(cut.finished[i]) is (stop in tokens)
    assert cut.response_mask[0].sum() <= 3


def test_rows_with_other_seeds_differ_and_a_rerun_repeats() -> None:
    model = flat_model()
    first = sample(model, [PROMPTS[0]] * 5, eos_ids=NEVER)
    again = sample(model, [PROMPTS[0]] * 5, eos_ids=NEVER)
    assert torch.equal(first.response_ids, again.response_ids)
    assert torch.equal(first.logprobs, again.logprobs)
    assert len({tuple(r) for r in first.response_ids.tolist()}) == 5
    # the global generator is neither used nor reset
    state = torch.random.get_rng_state()
    sample(model, PROMPTS)
    assert torch.equal(torch.random.get_rng_state(), state)


# ------------------------------------------------------------------------------ masks and limits
def test_the_mask_ends_with_the_first_end_of_turn_token_included() -> None:
    got = sample(flat_model(), PROMPTS * 4, row_seeds=list(range(20)), max_new_tokens=9)
    assert 0 < int(got.finished.sum()) < 20
    for ids, mask, finished in zip(
        got.response_ids.tolist(), got.response_mask.tolist(), got.finished.tolist(), strict=True
    ):
        ends = [t for t, token in enumerate(ids) if token in EOS]
        count = ends[0] + 1 if ends else 9
        assert mask == [True] * count + [False] * (9 - count)
        assert finished is bool(ends)
        assert not any(ids[count:])  # pad_id


def test_pad_id_may_be_the_end_of_turn_token() -> None:
    model = flat_model()
    stop = int(sample(model, PROMPTS, eos_ids=NEVER).response_ids[2, 4])
    apart = sample(model, PROMPTS, eos_ids={stop}, pad_id=0)
    same = sample(model, PROMPTS, eos_ids={stop}, pad_id=stop)
    assert torch.equal(apart.response_mask, same.response_mask)
    mask = same.response_mask
    assert torch.equal(apart.response_ids[mask], same.response_ids[mask])
    assert (same.response_ids[~mask] == stop).all()
    # a prompt that holds the pad token is not taken for padding
    prompt = [[stop, 5, stop]]
    alone = sample(model, prompt, eos_ids={stop}, pad_id=stop)
    other = sample(model, [*prompt, [4] * 6], eos_ids={stop}, pad_id=stop)
    assert torch.equal(alone.response_ids[0], other.response_ids[0])


def test_a_response_cut_at_the_limit_is_not_finished_and_one_that_ends_there_is() -> None:
    model = flat_model()
    free = sample(model, PROMPTS[:1], eos_ids=NEVER, max_new_tokens=4)
    assert not free.finished.any() and free.response_mask.all()
    last = int(free.response_ids[0, 3])
    if last not in free.response_ids[0, :3].tolist():
        ended = sample(model, PROMPTS[:1], eos_ids={last}, max_new_tokens=4)
        assert ended.finished.all() and ended.response_mask.all()


def test_trimmed_drops_only_empty_columns() -> None:
    got = sample(flat_model(), PROMPTS, max_new_tokens=60)
    assert got.response_ids.shape == (5, 60)
    trim = got.trimmed()
    width = int(got.response_mask.sum(1).max())
    assert width < 60
    assert trim.response_ids.shape == trim.logprobs.shape == trim.response_mask.shape == (5, width)
    assert trim.response_mask.sum() == got.response_mask.sum()


# --------------------------------------------------------------------------------------- greedy
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
def test_greedy_equals_transformers_generate(name: str) -> None:
    model = make_model(name)
    got = sample(model, PROMPTS, greedy=True, eos_ids=NEVER)
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            want = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=12,
                min_new_tokens=12,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert got.response_ids[i].tolist() == want[0, len(prompt) :].tolist()


# ------------------------------------------------------------------------------------- sampling
def test_first_tokens_follow_the_softmax() -> None:
    model = flat_model()
    count, temperature, prompt = 4000, 0.8, [5, 9, 11]
    got = sample(
        model,
        [prompt] * count,
        row_seeds=make_row_seeds(3, 0, range(count)),
        max_new_tokens=1,
        temperature=temperature,
        batch_size=1000,
    )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    p = torch.softmax(logits.double() / temperature, dim=0)
    assert p.max() < 0.7
    found = torch.bincount(got.response_ids[:, 0], minlength=V).double()
    large = p * count >= 5  # the chi-square approximation needs five expected
    cells = torch.cat([p[large], p[~large].sum().reshape(1)]) * count
    seen = torch.cat([found[large], found[~large].sum().reshape(1)])
    statistic = float(((seen - cells).square() / cells.clamp(min=1e-9)).sum())
    degrees = int(large.sum())
    assert degrees > 5
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)


# ------------------------------------------------------------------------------- modes, refusals
def test_dropout_is_off_inside_and_every_mode_is_restored() -> None:
    model = flat_model("gpt2")  # has dropout 0.1
    want = sample(model, PROMPTS)
    model.train()
    model.transformer.h[1].eval()
    before = [m.training for m in model.modules()]
    got = sample(model, PROMPTS)
    assert torch.equal(got.response_ids, want.response_ids)
    assert [m.training for m in model.modules()] == before
    with pytest.raises(IndexError):
        sample(model, [[V + 5]])
    assert [m.training for m in model.modules()] == before


def test_autocast_decodes_and_leaves_no_gradientless_weights_behind() -> None:
    model = flat_model()
    exact = sample(model, PROMPTS, max_new_tokens=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sample(model, PROMPTS)
        assert got.logprobs.dtype == torch.float32 and torch.isfinite(got.logprobs).all()
        model(input_ids=torch.tensor(PROMPTS[:1])).logits.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    same = got.response_ids[:, 0] == exact.response_ids[:, 0]
    assert same.sum() >= 3
    gap = (got.logprobs[:, 0] - exact.logprobs[:, 0])[same].abs()
    assert gap.max() < 0.1


def test_frozen_weights_are_cast_once_and_stay_frozen() -> None:
    model = flat_model().requires_grad_(False)
    prompts = [[5, 6, 7], [8, 9]]
    shape = tuple(model.get_input_embeddings().weight.shape)

    def casts_of_the_head(steps: int) -> int:
        with torch.profiler.profile(record_shapes=True) as profile, torch.autocast("cpu"):
            sample(model, prompts, max_new_tokens=steps, eos_ids=NEVER)
        return sum(
            e.count
            for e in profile.key_averages(group_by_input_shape=True)
            if e.key == "aten::_to_copy" and e.input_shapes and tuple(e.input_shapes[0]) == shape
        )

    assert casts_of_the_head(2) == casts_of_the_head(6) > 0
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="row_seeds"), torch.autocast("cpu"):
        sample(model, prompts, max_new_tokens=2, row_seeds=[1])
    assert not any(p.requires_grad for p in model.parameters())


def test_results_can_enter_a_graph() -> None:
    got = sample(flat_model(), PROMPTS)
    x = torch.zeros_like(got.logprobs, requires_grad=True)
    (x * got.logprobs).sum().backward()  # an inference tensor would be refused here
    assert x.grad is not None


def test_a_bad_request_is_refused() -> None:
    model = flat_model()
    for match, options in [
        ("exactly one", {"row_seeds": None}),
        ("exactly one", {"uniforms": torch.zeros(5, 12), "row_seeds": SEEDS}),
        ("needed uniforms", {"uniforms": torch.zeros(5, 3)}),
        ("row_seeds for 5 prompts", {"row_seeds": [1]}),
        ("temperature", {"temperature": 0.0}),
        ("max_new_tokens", {"max_new_tokens": 0}),
    ]:
        with pytest.raises(ValueError, match=match):
            sample(model, PROMPTS, **options)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample(model, [[1], []])


def test_no_prompts_give_an_empty_rollout() -> None:
    got = sample(flat_model(), [], row_seeds=[])
    assert got.response_ids.shape == (0, 12)
