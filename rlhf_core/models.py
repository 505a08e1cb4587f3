"""Loading, freezing and saving models.

Three kinds of module take part in training, and each is called as a whole (so that a wrapper's
gradient exchange sees one forward per backward):

* `Policy`       causal LM -> log-probabilities of marked tokens
* `ScalarModel`  backbone + linear head -> one number per sequence (reward) or token (value)
* `ActorCritic`  both, for PPO

d hidden size, B sequences, S positions. Sequences are right-padded.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from rlhf_core.adapters import save_adapter
from rlhf_core.batching import derive_seed
from rlhf_core.errors import ConfigError, ModelError
from rlhf_core.jobs import TrainSettings
from rlhf_core.last_mlp import only_at
from rlhf_core.logprobs import (
    BareBackbone,
    backbone,
    backbone_hidden,
    causal_lm,
    response_logprobs,
)
from rlhf_core.pairs import block_mask, ends_of
from rlhf_core.remote_code import is_trusted
from rlhf_core.unpadded import ATTENTION_SHARE, leaves_out
from rlhf_core.weights import REWARD_HEAD

_WEIGHTS = ("model.safetensors", "pytorch_model", "adapter_model", REWARD_HEAD)
_SCALE = "reward.json"
_PREFIXES = ("policy", "critic", "model", "backbone", "base_model", "transformer", "decoder")


# ------------------------------------------------------------------------------------ modules


class Policy(nn.Module):
    """A causal LM that returns log-probabilities instead of logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        marked: Tensor,
        temperature: float = 1.0,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities (B,S) in nats of the marked tokens, 0 elsewhere.

        Args:
            input_ids: (B,S). mask: (B,S) bool, True at real tokens; None where rows are packed.
            marked: (B,S) bool, True where a log-probability is wanted; never column 0.
            temperature: the logits are divided by it.
            position_ids: (B,S) of packed rows, see `backbone_hidden`.
        """
        return response_logprobs(self.model, input_ids, mask, position_ids, marked, temperature)


class ScalarModel(nn.Module):
    """Backbone of a causal LM with a linear head to one number, normalised by mean and std."""

    def __init__(self, backbone: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden_size, 1)
        self.mean, self.std = 0.0, 1.0
        self.pooling = "last"

    def reset_head(self, seed: int) -> None:
        """Head weights ~ N(0, 1/sqrt(d+1)), bias 0 ("The N+ implementation details")."""
        generator = torch.Generator().manual_seed(derive_seed(seed, 0x5EED))
        d = self.head.in_features
        with torch.no_grad():
            self.head.weight.copy_(
                torch.randn(1, d, generator=generator) * (1.0 / math.sqrt(d + 1))
            )
            self.head.bias.zero_()

    def states(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """What the head reads at every position, (B,S,d)."""
        hidden = backbone_hidden(BareBackbone(self.backbone), input_ids, mask)  # (B,S,d)
        if self.pooling == "mean":  # of all tokens so far: each position sees only its past
            real = mask.unsqueeze(-1).to(hidden.dtype)  # (B,S,1)
            hidden = (hidden * real).cumsum(dim=1) / real.cumsum(dim=1).clamp(min=1.0)
        return hidden

    def per_token(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The normalised number at every position, (B,S) fp32."""
        hidden = self.states(input_ids, mask)  # (B,S,d)
        raw = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()  # (B,S)
        return (raw - self.mean) / self.std

    def forward(self, input_ids: Tensor, mask: Tensor, segments: Tensor | None = None) -> Tensor:
        """Scores (B,) fp32: the number at each row's last real token.

        Args:
            mask: (B,S) bool; position ids where segments are given.
            segments: (B,S) of pairs that share a row, see `rlhf_core.pairs`; the scores are then
                (2B,), those of the chosen replies first.
        """
        if segments is not None:
            return self._of_pairs(input_ids, mask, segments)
        values = self.per_token(input_ids, mask)  # (B,S)
        return values.gather(1, last_real(mask).unsqueeze(1)).squeeze(1)

    def _of_pairs(self, input_ids: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        ends = [ends_of(segments, reply) for reply in (1, 2)]  # (B,) each
        read = torch.zeros_like(segments, dtype=torch.bool)  # (B,S)
        read.scatter_(1, torch.stack(ends, dim=1), True)
        whole = self.pooling != "last"
        with contextlib.nullcontext() if whole else only_at(self.backbone, read):
            hidden = backbone_hidden(
                BareBackbone(self.backbone), input_ids, block_mask(segments), positions
            )  # (B,S,d)
        pooled = []
        for reply, end in enumerate(ends, start=1):
            if self.pooling == "mean":
                own = ((segments == 0) | (segments == reply)).unsqueeze(-1).to(hidden.dtype)
                pooled.append((hidden * own).sum(dim=1) / own.sum(dim=1))  # (B,d)
            else:
                rows = torch.arange(len(hidden), device=hidden.device)
                pooled.append(hidden[rows, end])  # (B,d)
        raw = self.head(torch.cat(pooled).to(self.head.weight.dtype)).squeeze(-1).float()  # (2B,)
        return (raw - self.mean) / self.std


def last_real(mask: Tensor) -> Tensor:
    """Position (B,) of each row's last real token, whichever side is padded."""
    return (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that one backward trains both."""

    def __init__(self, policy: Policy, critic: ScalarModel) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        marked: Tensor,
        temperature: float = 1.0,
        ptx: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities and values of the marked tokens, and the log-probabilities of ptx.

        Args:
            input_ids, mask, marked: (B,S), see `Policy`.
            ptx: the same three of language-modelling rows, at temperature 1.

        Returns:
            logprobs (B,S); values (B,S), at each marked token the critic's value of the state
            before it; ptx log-probabilities or None.
        """
        logprobs = self.policy(input_ids, mask, marked, temperature)
        states = self.critic.per_token(input_ids, mask)  # (B,S)
        before = torch.cat([states[:, :1], states[:, :-1]], dim=1)  # (B,S), moved one right
        values = torch.where(marked, before, torch.zeros_like(before))
        return logprobs, values, None if ptx is None else self.policy(*ptx)


def padding_cost(module: nn.Module) -> float:
    """What a padded token costs beside a real one in a forward pass of policies and critics."""
    bases = [
        backbone(causal_lm(m.model if isinstance(m, Policy) else BareBackbone(m.backbone)))
        for m in module.modules()
        if isinstance(m, (Policy, ScalarModel))
    ]
    lean = bases and all(leaves_out(base) for base in bases)
    return ATTENTION_SHARE if lean else 1.0


# ------------------------------------------------------------------------------------- loading


def load_causal_lm(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal LM from a Hugging Face folder, dropout off, on the CPU.

    Raises:
        ModelError: weights are missing, unexpected or unreadable; each key is named.
    """
    return _load(AutoModelForCausalLM, folder, dtype)


def _load(auto: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    trust = is_trusted(Path(folder))
    try:
        model, info = auto.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=trust
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"The model in {folder} cannot be loaded: {error}") from error
    problems = {
        kind: sorted(str(k) for k in info.get(kind) or [])
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(problems.values()):
        shown = "; ".join(
            f"{len(keys)} {kind.replace('_', ' ')}: {', '.join(keys[:5])}"
            for kind, keys in problems.items()
            if keys
        )
        raise ModelError(
            f"The weights in {folder} do not fit its config.json: {shown}. Use the files as the "
            "model's authors saved them."
        )
    disable_dropout(model)
    model.config.use_cache = False
    return model.eval()


def new_scalar_model(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> ScalarModel:
    """A reward model with the backbone of a causal LM and a fresh head."""
    causal = load_causal_lm(folder, dtype)
    size = causal.get_output_embeddings().weight.shape[1]
    model = ScalarModel(causal.base_model, size)
    model.reset_head(seed)
    return model.eval()


def load_scalar_model(folder: Path, dtype: torch.dtype = torch.float32) -> ScalarModel:
    """A reward model as `save_scalar_model` wrote it.

    Raises:
        ModelError: the folder is not a reward model, or its weights do not fit.
    """
    if not (folder / REWARD_HEAD).exists():
        raise ModelError(
            f"{folder} has no {REWARD_HEAD}: it is not a reward model of this project. Use the "
            "artifact of a reward stage."
        )
    backbone = _load(AutoModel, folder, dtype)
    head = load_file(folder / REWARD_HEAD)
    model = ScalarModel(backbone, head["weight"].shape[1])
    model.head.load_state_dict(head)
    scale = json.loads((folder / _SCALE).read_text())
    model.mean, model.std = float(scale["mean"]), float(scale["std"])
    model.pooling = str(scale["pooling"])
    model.head.to(dtype)
    return model.eval()


def disable_dropout(model: nn.Module) -> None:
    """Dropout probability 0 everywhere, so that train and eval mode compute the same."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


# ------------------------------------------------------------------------------------ freezing


def transformer_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of a model's transformer blocks.

    Raises:
        ModelError: no list of blocks of the configured length exists.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return name, module
    raise ModelError(f"{type(model).__name__} has no list of {config.num_hidden_layers} layers.")


def choose_trainable(model: nn.Module, settings: TrainSettings, seed: int) -> nn.Module:
    """Freeze what the settings leave out; add LoRA adapters if they ask for them.

    With `trainable_layers` the top n blocks, the last norm and an untied vocabulary head train
    (a tied head is the embedding, which stays frozen).

    Args:
        model: a transformers model (causal LM or backbone).

    Returns:
        The model, wrapped by peft if it has adapters.

    Raises:
        ConfigError: more trainable layers than the model has.
    """
    if settings.lora is not None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(derive_seed(seed, 0x10AA))  # peft initialises with the global generator
        targets, alpha = settings.lora.targets, settings.lora.alpha
        return get_peft_model(
            model,  # type: ignore[arg-type]
            LoraConfig(
                r=settings.lora.rank,
                lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
                target_modules=list(targets) if targets else "all-linear",
                lora_dropout=0.0,
                task_type="CAUSAL_LM" if model.get_output_embeddings() is not None else None,
            ),
        )
    count = settings.trainable_layers
    if count is None:
        return model
    name, layers = transformer_layers(model)
    if count > len(layers):
        raise ConfigError(
            f"trainable_layers is {count}, but the model has {len(layers)} layers: use at most "
            f"{len(layers)}, or leave it empty to train everything."
        )
    model.requires_grad_(False)
    for layer in list(layers)[len(layers) - count :]:
        layer.requires_grad_(True)
    parent = model.get_submodule(name.rpartition(".")[0])
    for child_name, child in parent.named_children():
        if child_name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
            child.requires_grad_(True)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        head.requires_grad_(True)
    return model


def share_frozen(*models: nn.Module) -> int:
    """Let equal frozen parameters of several models use one memory; returns the bytes saved.

    The lower layers of policy, reference, critic and reward model are the same numbers when only
    upper layers were trained. Parameters are compared by name (less the modules' own prefixes)
    and value; trained ones are left alone.
    """
    seen: dict[str, list[nn.Parameter]] = {}
    saved = 0
    for model in models:
        for name, param in model.named_parameters():
            if param.requires_grad:
                continue
            parts = name.replace("base_layer.", "").split(".")
            while parts[0] in _PREFIXES:
                parts.pop(0)
            for other in seen.setdefault(".".join(parts), []):
                if other.data_ptr() == param.data_ptr():
                    break
                alike = other.dtype == param.dtype and other.device == param.device
                if alike and torch.equal(other, param):
                    param.data = other.data
                    saved += param.numel() * param.element_size()
                    break
            else:
                seen[".".join(parts)].append(param)
    return saved


def adamw(module: nn.Module, settings: TrainSettings, rates: dict[str, float]) -> Any:
    """AdamW (betas 0.9/0.95, eps 1e-5) over what trains; no weight decay on biases and norms.

    Args:
        rates: name prefix of the parameters -> peak learning rate; the first match counts.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, param in module.named_parameters():
        if param.requires_grad:
            rate = next(r for prefix, r in rates.items() if name.startswith(prefix))
            decay = settings.weight_decay if param.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(param)
    return torch.optim.AdamW(
        [
            {"params": p, "lr": rate, "peak_lr": rate, "weight_decay": decay}
            for (rate, decay), p in groups.items()
        ],
        betas=(0.9, 0.95),
        eps=1e-5,
        fused=True,
    )


# -------------------------------------------------------------------------------------- saving


def export(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The module as fp32 on the CPU with the given (master) weights put in. Rank 0, at the end."""
    module = module.to("cpu").float()
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    return module


def merged(model: nn.Module) -> nn.Module:
    """The model with its LoRA adapters added into the weights; itself if it has none."""
    merge = getattr(model, "merge_and_unload", None)
    return merge() if callable(merge) else model


def save_causal_lm(model: nn.Module, folder: Path, source: Path) -> None:
    """Write a Hugging Face folder: safetensors, config, and the tokenizer files of `source`.

    LoRA adapters are merged into the weights, and lie beside them as adapters of `source` too.
    """
    save_adapter(model, folder, source)
    model = merged(model)
    model.config.use_cache = True  # type: ignore[union-attr]
    model.save_pretrained(folder, max_shard_size="4GB")  # type: ignore[operator]
    copy_companions(source, folder)


def save_scalar_model(model: ScalarModel, folder: Path, source: Path) -> None:
    """Write a reward model: backbone, head, and the score's mean and deviation."""
    save_adapter(model.backbone, folder, source)
    backbone = merged(model.backbone)
    backbone.save_pretrained(folder, max_shard_size="4GB")  # type: ignore[operator]
    head = {k: v.detach().float().contiguous() for k, v in model.head.state_dict().items()}
    save_file(head, folder / REWARD_HEAD)
    scale = {"mean": model.mean, "std": model.std, "pooling": model.pooling}
    (folder / _SCALE).write_text(json.dumps(scale) + "\n")
    copy_companions(source, folder)


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat template and generation config: whatever is not weights or written yet."""
    for path in sorted(source.iterdir()):
        skip = path.name.startswith(_WEIGHTS) or path.suffix in (".safetensors", ".jsonl")
        if path.is_file() and not skip and not path.name.endswith(".index.json"):
            target = folder / path.name
            if path.name == "generation_config.json" or not target.exists():
                shutil.copy(path, target)


def stop_tokens(folder: Path) -> set[int]:
    """Token ids that end an assistant's turn, from generation_config.json.

    Raises:
        ModelError: the model names none, so that replies would never end.
    """
    path = folder / "generation_config.json"
    eos = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    if eos is None:
        raise ModelError(
            f"{folder} names no eos_token_id in generation_config.json, so its replies would never "
            "end. Import the model with a chat template that has an end-of-turn token."
        )
    return set(eos) if isinstance(eos, list) else {int(eos)}
