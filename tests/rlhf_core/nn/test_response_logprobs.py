"""The oracle is torch.log_softmax over the full logits, with autograd's own gradients."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf_core.nn import backbone, chunked_logprobs, response_logprobs, vocabulary_head
from rlhf_core.nn.fast_paths import switched

V, D = 67, 32
_DECODER: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # logits far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _opt() -> nn.Module:
    config = OPTConfig(
        vocab_size=V,
        hidden_size=D,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,  # projections before and after the layers
        init_std=0.3,
    )
    return OPTForCausalLM(config)


def _gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=V, n_embd=D, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    )
    return GPT2LMHeadModel(config)


def _bloom() -> nn.Module:
    return BloomForCausalLM(
        BloomConfig(vocab_size=V, hidden_size=D, n_layer=2, n_head=4, initializer_range=0.3)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER)),
    "gpt2": _gpt2,
    "opt": _opt,
    "bloom": _bloom,
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_DECODER, logit_scale=0.25)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_DECODER, head_dim=8, final_logit_softcapping=3.0)
    ),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**_DECODER, logits_scaling=4.0)),
}


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Three left-padded prompts of 2 to 5 tokens with responses of 1 to 4: ids, mask, response."""
    generator = torch.Generator().manual_seed(1)
    prompt, response = torch.tensor([5, 2, 3]), torch.tensor([2, 4, 1])
    ids = torch.randint(3, V, (3, 9), generator=generator)
    real_prompt = torch.arange(5) >= 5 - prompt.unsqueeze(1)
    response_mask = torch.arange(4) < response.unsqueeze(1)
    attention = torch.cat([real_prompt, response_mask], dim=1)
    return ids.masked_fill(~attention, 0), attention.long(), response_mask


def oracle(model: nn.Module, ids: Tensor, attention: Tensor, mask: Tensor, temperature: float):
    """Row by row without any padding, full logits."""
    out = torch.zeros(mask.shape)
    entropy = torch.zeros(mask.shape)
    for row in range(ids.shape[0]):
        real = ids[row, attention[row].bool()].unsqueeze(0)
        count = int(mask[row].sum())
        logp = torch.log_softmax(model(input_ids=real).logits[0].float() / temperature, dim=-1)
        chosen = logp[:-1].gather(1, real[0, 1:].unsqueeze(1)).squeeze(1)
        out[row, :count] = chosen[-count:]
        entropy[row, :count] = -(logp.exp() * logp).sum(-1)[:-1][-count:]
    return out, entropy


# ------------------------------------------------------------------------------ token_logprobs
def tensors(dtype: torch.dtype, rows: int = 23) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, D, generator=generator, dtype=dtype)
    weight = torch.randn(V, D, generator=generator, dtype=dtype)
    bias = torch.randn(V, generator=generator, dtype=dtype)
    return hidden, weight, bias, torch.randint(0, V, (rows,), generator=generator)


@pytest.mark.parametrize("kept", [0, 2**20])
@pytest.mark.parametrize("chunk", [1, 5, 23, 1000, None])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("temperature", "scale", "softcap"), [(1.0, 1.0, None), (0.7, 0.3, None), (1.3, 2.0, 5.0)]
)
def test_token_logprobs_and_gradients_equal_log_softmax(
    kept: int,
    chunk: int | None,
    with_bias: bool,
    temperature: float,
    scale: float,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        chunked_logprobs._KEPT_LOGITS, "cpu", kept
    )  # 0: everything is computed again
    hidden, weight, bias, targets = tensors(torch.float64)
    leaves = [
        x.requires_grad_() for x in ([hidden, weight, bias] if with_bias else [hidden, weight])
    ]
    g_logp, g_ent = torch.randn(2, 23, dtype=torch.float64)

    got = chunked_logprobs.token_logprobs(
        hidden,
        weight,
        targets,
        bias=bias if with_bias else None,
        temperature=temperature,
        scale=scale,
        softcap=softcap,
        chunk=chunk,
        entropy=True,
    )
    grads = torch.autograd.grad((got[0] * g_logp + got[1] * g_ent).sum(), leaves)

    logits = (hidden @ weight.t() + (bias if with_bias else 0)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    full = torch.log_softmax(logits / temperature, dim=-1)
    want = full.gather(1, targets.unsqueeze(1)).squeeze(1), -(full.exp() * full).sum(-1)
    want_grads = torch.autograd.grad((want[0] * g_logp + want[1] * g_ent).sum(), leaves)

    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


@pytest.mark.parametrize(("temperature", "scale", "softcap"), [(0.7, 0.3, None), (1.3, 2.0, 5.0)])
def test_a_frozen_head_gives_the_hidden_states_the_same_gradient(
    temperature: float, scale: float, softcap: float | None
) -> None:
    hidden, weight, bias, targets = tensors(torch.float64)
    hidden.requires_grad_()
    options = {"bias": bias, "temperature": temperature, "scale": scale, "softcap": softcap}
    got = chunked_logprobs.token_logprobs(hidden, weight, targets, chunk=5, **options)
    logits = (hidden @ weight.t() + bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    want = torch.log_softmax(logits / temperature, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), hidden),
        torch.autograd.grad(want.square().sum(), hidden),
    )


def test_a_second_backward_pass_computes_what_the_first_one_used_up() -> None:
    hidden, weight, _, targets = tensors(torch.float64)
    weight.requires_grad_()
    loss = chunked_logprobs.token_logprobs(hidden, weight, targets, chunk=4).square().sum()
    first = torch.autograd.grad(loss, weight, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, weight), first)


def test_token_logprobs_without_entropy_has_the_same_gradient() -> None:
    hidden, weight, _, targets = tensors(torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    got = chunked_logprobs.token_logprobs(hidden, weight, targets, chunk=4)
    want = torch.log_softmax(hidden @ weight.t(), -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), [hidden, weight]),
        torch.autograd.grad(want.square().sum(), [hidden, weight]),
        atol=1e-4,
        rtol=1e-4,
    )


def test_token_logprobs_gives_a_gradient_only_where_one_is_required() -> None:
    hidden, weight, _, targets = tensors(torch.float32)
    assert not chunked_logprobs.token_logprobs(hidden, weight, targets).requires_grad
    weight.requires_grad_()
    chunked_logprobs.token_logprobs(hidden, weight, targets).sum().backward()
    assert weight.grad is not None and hidden.grad is None
    frozen = weight.detach()
    hidden.requires_grad_()
    chunked_logprobs.token_logprobs(hidden, frozen, targets).sum().backward()
    assert hidden.grad is not None and frozen.grad is None


def test_token_logprobs_under_autocast_multiplies_in_bf16_and_normalises_in_fp32() -> None:
    hidden, weight, _, targets = tensors(torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = chunked_logprobs.token_logprobs(hidden, weight, targets, chunk=5)
        logits = nn.functional.linear(hidden, weight)
    assert got.dtype == torch.float32 and logits.dtype == torch.bfloat16
    want = torch.log_softmax(logits.float(), -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    for a, b in zip(  # the backward pass runs outside the autocast block
        torch.autograd.grad(got.sum(), [hidden, weight]),
        torch.autograd.grad(want.sum(), [hidden, weight]),
        strict=True,
    ):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


def test_token_logprobs_of_half_precision_weights_are_fp32() -> None:
    hidden, weight, _, targets = tensors(torch.bfloat16)
    weight.requires_grad_()
    got = chunked_logprobs.token_logprobs(hidden, weight, targets)
    got.sum().backward()
    assert got.dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


def test_chunked_cross_entropy_sum_equals_cross_entropy() -> None:
    hidden, weight, bias, targets = tensors(torch.float32)
    got = chunked_logprobs.chunked_cross_entropy_sum(hidden, weight, targets, bias=bias, chunk=4)
    want = nn.functional.cross_entropy(hidden @ weight.t() + bias, targets, reduction="sum")
    torch.testing.assert_close(got, want)


def test_no_rows_give_an_empty_result_with_a_gradient() -> None:
    hidden, weight = torch.zeros(0, D, requires_grad=True), torch.ones(V, D, requires_grad=True)
    got = chunked_logprobs.token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert got.shape == (0,)
    got.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_token_logprobs_refuse_shapes_and_temperatures_that_do_not_fit() -> None:
    hidden, weight, _, targets = tensors(torch.float32)
    with pytest.raises(ValueError, match="weight"):
        chunked_logprobs.token_logprobs(hidden, weight.t(), targets)
    with pytest.raises(ValueError, match="targets"):
        chunked_logprobs.token_logprobs(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="temperature"):
        chunked_logprobs.token_logprobs(hidden, weight, targets, temperature=0.0)


_MEMORY = """
import resource, torch
from rlhf_core.nn.response_logprobs import token_logprobs
torch.set_num_threads(1)
N, d, V = 4096, 16, 50_000                      # full logits: 819 MB
h, w = torch.randn(N, d, requires_grad=True), torch.randn(V, d, requires_grad=True)
y = torch.randint(0, V, (N,))
token_logprobs(h[:64], w, y[:64], chunk=64).sum().backward()   # libraries are loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
token_logprobs(h, w, y, chunk=64).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_peak_memory_is_that_of_a_chunk_not_of_all_logits() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(done.stdout) < 250  # MiB; one chunk is 12, all logits are 781


# -------------------------------------------------------------------------------- whole models
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", list(MODELS))
def test_response_logprobs_equal_the_model_on_unpadded_rows(name: str, temperature: float) -> None:
    model = make_model(name)
    assert vocabulary_head.lm_head(model) is not None  # the fast path, not the fallback
    ids, attention, mask = batch()
    with torch.no_grad():
        want, want_entropy = oracle(model, ids, attention, mask, temperature)
        got, entropy = response_logprobs.response_logprobs(
            model, ids, attention, None, mask, temperature, entropy=True
        )
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropy, want_entropy, atol=1e-4, rtol=1e-4)
    assert not got[~mask].any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
def test_left_and_right_padding_change_no_logprob(name: str) -> None:
    model = make_model(name)
    ids, attention, mask = batch()
    with torch.no_grad():
        want = response_logprobs.response_logprobs(model, ids, attention, None, mask)
        more = nn.functional.pad(ids, (3, 2), value=7), nn.functional.pad(attention, (3, 2))
        got = response_logprobs.response_logprobs(
            model, *more, None, nn.functional.pad(mask, (0, 2))
        )
    torch.testing.assert_close(got[:, :-2], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
def test_response_logprobs_have_the_gradient_of_the_full_logits(name: str) -> None:
    model = make_model(name)
    ids, attention, mask = batch()
    got = response_logprobs.response_logprobs(model, ids, attention, None, mask, 0.8, chunk=2)
    got.square().sum().backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    want, _ = oracle(model, ids, attention, mask, 0.8)
    want.square().sum().backward()
    for k, p in model.named_parameters():
        if p.grad is not None:
            assert (grads[k] - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-4, k


def test_right_padded_rows_go_without_a_mask_where_a_model_needs_none() -> None:
    model = make_model("llama")
    seen: list[object] = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    ids = torch.randint(0, V, (2, 6))
    right, left = torch.ones(2, 6).bool(), torch.ones(2, 6).bool()
    right[1, 4:] = left[1, :2] = False
    backbone.backbone_hidden(model, ids, right)
    assert seen[-1] is None
    backbone.backbone_hidden(model, ids, left)
    assert seen[-1] is not None
    hook.remove()

    class Backwards(type(model.base_model)):  # type: ignore[misc]
        """A model whose tokens see what comes after them."""

        def forward(self, **kwargs):  # type: ignore[no-untyped-def]
            out = super().forward(**kwargs)
            real = kwargs["attention_mask"]
            real = torch.ones_like(kwargs["input_ids"]) if real is None else real
            out.last_hidden_state = out[0] + (out[0] * real.unsqueeze(2)).sum(1, keepdim=True)
            return out

    other = make_model("llama").base_model
    other.__class__ = Backwards
    found = backbone.backbone_hidden(backbone.BareBackbone(other), ids, right)
    assert not backbone.WITHOUT_MASK.works(other)
    torch.testing.assert_close(found, backbone._hidden_of(other, ids, right, None))


def test_a_mask_over_the_whole_row_is_allowed_but_not_its_first_column() -> None:
    model = make_model("llama")
    ids, attention, mask = batch()
    wide = nn.functional.pad(mask, (5, 0))
    with torch.no_grad():
        got = response_logprobs.response_logprobs(model, ids, attention, None, wide)
        want = response_logprobs.response_logprobs(model, ids, attention, None, mask)
    torch.testing.assert_close(got[:, 5:], want)
    wide[0, 0] = True
    with pytest.raises(ValueError, match="column 0"):
        response_logprobs.response_logprobs(model, ids, attention, None, wide)
    with pytest.raises(ValueError, match="bool"):
        response_logprobs.response_logprobs(model, ids, attention, None, mask.long())


class DoubledLlama(LlamaForCausalLM):
    """Does to its logits what no config attribute tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.5 * output.logits.roll(1, dims=-1)
        return output


def test_an_unknown_treatment_of_the_logits_falls_back_to_the_models_forward() -> None:
    torch.manual_seed(0)
    model = DoubledLlama(LlamaConfig(**_DECODER)).eval()
    assert vocabulary_head.lm_head(model) is None
    ids, attention, mask = batch()
    with torch.no_grad():
        got, entropy = response_logprobs.response_logprobs(
            model, ids, attention, None, mask, 0.9, entropy=True
        )
        want, want_entropy = oracle(model, ids, attention, mask, 0.9)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropy, want_entropy, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_switched_off_the_models_own_forward_gives_the_logits(name: str) -> None:
    model = make_model(name)
    ids, attention, mask = batch()
    with torch.no_grad():
        want = response_logprobs.response_logprobs(
            model, ids, attention, None, mask, 0.9, entropy=True
        )
        with switched(False):
            assert vocabulary_head.lm_head(model) is None
            got = response_logprobs.response_logprobs(
                model, ids, attention, None, mask, 0.9, entropy=True
            )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["cohere", "gemma2", "granite"])
def test_the_heads_trial_notices_a_scale_or_cap_that_the_config_hides(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(name)
    with torch.no_grad():  # so small that a soft cap at 3 hardly shows on ordinary logits
        for p in model.parameters():
            p.mul_(0.05)
    head = vocabulary_head.lm_head(model)
    assert head is not None
    hidden = dataclasses.replace(head, scale=1.0, softcap=None)
    monkeypatch.setattr(vocabulary_head, "_read_head", lambda lm: hidden)
    assert not vocabulary_head.PATH.try_out(model)


def test_the_heads_trial_restores_modes_and_uses_no_random_numbers() -> None:
    model = make_model("gpt2").train()
    model.transformer.h[0].eval()
    before = [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    assert vocabulary_head.lm_head(model) is not None
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_lora_is_active_and_an_adapter_on_the_head_is_not_bypassed() -> None:
    peft = pytest.importorskip("peft")
    ids, attention, mask = batch()
    for targets, fast in ((["q_proj"], True), (["q_proj", "lm_head"], False)):
        config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
        model = peft.get_peft_model(make_model("llama"), config).eval()
        assert (vocabulary_head.lm_head(model) is not None) is fast
        with torch.no_grad():
            got = response_logprobs.response_logprobs(model, ids, attention, None, mask)
            want, _ = oracle(model, ids, attention, mask, 1.0)
            with model.disable_adapter():
                bare = response_logprobs.response_logprobs(model, ids, attention, None, mask)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert (got - bare).abs().max() > 1e-2
