"""Weights, gradients and optimizer states of a stage on one rank, in bytes; see `memory`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf_core.jobs import Resources, TrainSettings
from rlhf_core.model_files.shape import ModelShape
from rlhf_core.preflight.activations import Passes

_BUCKET = 12 * 2**20  # elements that ZeRO reduces at once
_DECODED_TOGETHER = 64  # rows, see rlhf_core.rollout.generate.generate
_DIVERGENCE = 9  # fp32 arrays as large as a chunk of logits, at once
_NF4 = 4.127 / 8  # bytes of a quantised weight, with its scales


@dataclass(frozen=True)
class Plan:
    """A stage's model on one rank."""

    shape: ModelShape
    settings: TrainSettings
    resources: Resources
    device: str
    quantization: str | None
    reward_models: int = 1  # that score the rollouts of an online stage

    @property
    def width(self) -> int:
        """Bytes of a number in the training precision."""
        return 4 if self.settings.precision == "fp32" else 2

    @property
    def frozen_width(self) -> int:
        """Bytes of a frozen weight beside trained ones, see `training.policy.frozen_storage`."""
        kind, bf16 = self.resources.strategy, self.settings.precision == "bf16"
        if kind.startswith("zero"):
            return self.width
        if kind == "ddp" and bf16 and (self.quantization or (self.settings.lora and self._on_gpu)):
            return 2
        return 4

    @property
    def _on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def top(self) -> int:
        """Number of layers in the backward pass."""
        return min(self.settings.trainable_layers or self.shape.layers, self.shape.layers)

    @property
    def passes(self) -> Passes:
        ddp, lora = self.resources.strategy == "ddp", self.settings.lora
        return Passes(
            shape=self.shape,
            device=self.device,
            width=self.width,
            stream=(self.frozen_width if lora else 4) if ddp else self.width,
            autocast=ddp and self.width == 2,
            adapters=0 if lora is None else lora.rank,
            checkpointing=self.resources.gradient_checkpointing,
            layers=self.top,
            fused_norms=self._on_gpu and self.resources.fast_paths and self.shape.fused_norms,
        )

    def trained(self, parameters: int) -> int:
        """Number of parameters that are trained."""
        shape, lora = self.shape, self.settings.lora
        if lora is not None:
            mlp = (3 if shape.gated else 2) * (shape.hidden + shape.intermediate)
            attention = 2 * (shape.hidden + shape.query) + 2 * (shape.hidden + shape.key_value)
            return lora.rank * (mlp + attention) * shape.layers
        if self.settings.trainable_layers is None:
            return parameters
        return self.top * shape.layer_parameters + shape.head_parameters

    def states(self, parameters: int) -> dict[str, int]:
        """Weights, gradients and optimizer states of one trained model."""
        trained, c, n = self.trained(parameters), self.width, self.resources.world_size
        # Adapters are additional weights; trainable layers are part of the model's.
        frozen = parameters if self.settings.lora is not None else max(0, parameters - trained)
        kind, half = self.resources.strategy, c == 2
        weights = self.frozen(frozen)
        if kind == "ddp":
            layers = self.shape.layers * self.shape.layer_parameters
            casts = c * min(trained, layers) if half else 0
            if half and self.settings.lora is not None and self.frozen_width == 4:
                # Of frozen weights in fp32 autograd keeps a copy until each layer's backward pass.
                casts += (
                    c
                    * layers
                    // (self.shape.layers if self.resources.gradient_checkpointing else 1)
                )
            return {
                "weights": weights + 4 * trained + casts,
                "gradients": 4 * trained,
                "optimizer": 8 * trained,
            }
        if kind == "fsdp2":
            return {
                "weights": (weights + 4 * trained) // n,
                "gradients": 4 * trained // n,
                "optimizer": 8 * trained // n,
            }
        return {
            "weights": weights + c * trained,
            "gradients": c * trained if kind == "zero1" else c * trained // n,
            "optimizer": 0 if kind == "zero2_cpu" else 12 * trained // n,
        }

    def frozen(self, parameters: int) -> int:
        """Frozen weights of one model, all ranks together under fsdp2."""
        if self.quantization != "nf4":
            return self.frozen_width * parameters
        layers = min(parameters, self.shape.layers * self.shape.layer_parameters)
        return int(_NF4 * layers) + self.frozen_width * (parameters - layers)

    def frozen_models(self, models: int) -> int:
        """Reference and reward models; with trainable_layers and ddp they share the lower layers.
        No reference where the settings measure no KL.

        Args:
            models: that are trained: policy and critic.
        """
        shape, sharded = self.shape, self.resources.strategy == "fsdp2"
        wanted = getattr(self.settings, "wants_reward_model", True)
        judges = self.reward_models if wanted else 0
        reward = judges * shape.backbone_parameters
        if self.settings.lora is not None:  # the reference is the policy without its adapters
            if sharded:
                return self.width * reward // self.resources.world_size
            return self.frozen(reward)
        c = 4 if self.resources.strategy == "ddp" else self.width
        reference = int(getattr(self.settings, "needs_reference", True))
        count = reference * shape.parameters + reward
        if self.settings.trainable_layers is not None and c == 4:
            # The policy holds the lower layers for reference, critic and reward model too.
            copies = models + reference + judges - 1
            count -= copies * (shape.parameters - self.trained(shape.parameters))
        return c * count // (self.resources.world_size if sharded else 1)

    def teacher(self, shape: ModelShape) -> int:
        """Weights of a distillation's teacher; of a sharded one also what is whole of it while it
        is compared with.

        Args:
            shape: its sizes.
        """
        if self.resources.strategy == "ddp" and (self.quantization or not self._on_gpu):
            return replace(self, shape=shape).frozen(shape.parameters)
        ranks = self.resources.world_size if self.resources.strategy == "fsdp2" else 1
        whole = replace(self, shape=shape).gathered(layers=False)
        return self.width * shape.parameters // ranks + whole

    def divergence(self, predicted: int) -> int:
        """A distillation's loss: arrays of a chunk of both models' logits, and the gradient of the
        student's head, which is there from the forward pass on; see `nn.chunked_divergence`."""
        vocabulary = self.shape.vocabulary
        least, logits = (16, 2**22) if self.device == "cpu" else (16, 2**25)
        rows = min(predicted, max(least, logits // vocabulary))
        trained = self.settings.lora is None
        return 4 * vocabulary * (_DIVERGENCE * rows + (self.shape.hidden if trained else 0))

    def gathered(self, *, layers: bool) -> int:
        """fsdp2: what is whole on each rank during a pass: embedding, head and last norm.

        Args:
            layers: the layers instead, while one layer's backward pass runs: it and the next one,
                and where they are trained its gradient, and in fp32 that of the layer before.
        """
        shape, c = self.shape, self.width
        if self.resources.strategy != "fsdp2":
            return 0
        if layers:
            each = 2 * c if self.settings.lora is not None else 3 * c + 4
            return each * shape.layer_parameters
        return c * (shape.embedding_parameters + shape.head_parameters + shape.hidden)

    def working(self, tokens: int, length: int, models: int, predicted: int) -> int:
        """The most that a step needs at once beside states and activations.

        Args:
            models: with activations at the same time: policy and critic.
            predicted: tokens that the vocabulary head computes logits for.
        """
        shape, c, kind = self.shape, self.width, self.resources.strategy
        layer = shape.layer_parameters
        whole = self.settings.lora is None and self.settings.trainable_layers is None
        tied, trains_head = shape.head_parameters == 0, whole or shape.head_parameters > 0
        trains_head = trains_head and self.settings.lora is None
        weight = shape.vocabulary * shape.hidden
        gradient = (4 if kind == "ddp" else c) * weight
        moments = [self.passes.one_layer(tokens, length) + self.gathered(layers=True)]
        if predicted:
            # A tied head's gradient waits for the embedding's, any under fsdp2 for the last layer.
            waits = trains_head and (tied or kind == "fsdp2")
            moments[0] += gradient if waits else 0
            others = (models - 1) * self.passes.kept(tokens, length)  # the critic comes later
            logits = self.passes.head(predicted, trained=trains_head)
            moments.append(logits + (c * layer if kind == "fsdp2" else 0) - others)
        kept = models * self.passes.kept(tokens, length)
        if whole:  # the end of the backward pass: the embedding's gradient
            copies = 3 if tied and predicted else 1
            moments.append(copies * gradient + (4 * weight if kind == "fsdp2" else 0) - kept)
        if kind in ("zero1", "zero2") and c == 2:  # the step: a shard of the gradient in fp32
            shard = models * self.trained(shape.parameters) // self.resources.world_size
            moments.append(4 * shard - kept)
        if kind.startswith("zero") and whole:
            moments[0] += 2 * c * _BUCKET
        return max(0, *moments)

    def rollout(self, rows: int, length: int) -> int:
        """Sampling by the built-in loop: keys and values of the replies that are decoded at once,
        and a pass over their prompts."""
        shape, c = self.shape, self.width
        rows = min(rows, _DECODED_TOGETHER)
        layer = rows * length * 2 * shape.key_value * c
        # Rows that end are cut out layer by layer; transformers' own cache grows by concatenation.
        cache = layer * (shape.layers + 1 if self.resources.fast_paths else 2 * shape.layers)
        prompts = rows * max(0, length - getattr(self.settings, "max_new_tokens", 0))
        # fsdp2 gathers the whole policy where it fits, see rlhf_core.rollout.sharded; else layers.
        layers = 2 * c * shape.layer_parameters if self.resources.strategy == "fsdp2" else 0
        return cache + prompts * (3 * c * shape.intermediate + 2 * 4 * shape.hidden) + layers

    @property
    def loaded_width(self) -> int:
        """Bytes of a weight while a model is loaded."""
        return self.frozen_width if self.settings.lora is not None else 4

    def host(self, models: int) -> tuple[int, int]:
        """Main memory of each rank on a GPU, and of rank 0 beside that: what they load, or copy for
        a checkpoint, and what rank 0 gathers for the result."""
        shape, kind = self.shape, self.resources.strategy
        trained = models * self.trained(shape.parameters)
        loaded = self.loaded_width * shape.parameters  # a model at a time
        if self.quantization is not None:  # quantised layer by layer
            loaded = self.frozen_width * shape.embedding_parameters
        offloaded = 16 * trained // self.resources.world_size if kind == "zero2_cpu" else 0
        each = 0 if kind == "fsdp2" else loaded
        if kind == "fsdp2":  # rank 0 alone loads, all that is trained
            loaded *= models
        each = max(each, self.checkpoint(trained))
        first = max(loaded, 4 * shape.parameters)  # the result, in fp32
        return each + offloaded, max(0, first - each)

    def checkpoint(self, trained: int) -> int:
        """What a rank copies for a checkpoint: its part of weights and AdamW's states, in fp32."""
        return 12 * trained // self.resources.world_size
