"""The BitVLA network in PyTorch, for training. Its twin for the robot is `bitvla.runtime.network`.

    images -> vision tower -> connector -.
    instruction -> embeddings -----------+-> [text | images | proprio | text | slots | stop] -> decoder -> action head
    state -> proprio projector ----------'

A vision-language model has a language head over the decoder instead, and neither state nor slots.

Blocks are those of `transformers` (SigLIP, BitNet) with our ternary linear layers put in; parameter names are those of
the published BitVLA checkpoints. Tensor letters: B batch, V views, P patches, S sequence, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BitNetConfig, SiglipVisionConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bitnet.modeling_bitnet import BitNetDecoderLayer, BitNetRMSNorm, BitNetRotaryEmbedding
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings

from bitvla.config import ActionConfig, FlowConfig, LanguageConfig, LanguageModelConfig, PolicyConfig, VisionConfig
from bitvla.model.ternary import make_ternary

# On a CPU the backward pass of PyTorch's fused attention is several times slower than plain products at these lengths.
ATTENTION = "sdpa" if torch.cuda.is_available() else "eager"


class Batch(NamedTuple):
    """What the network sees. Sequences of different lengths are padded on the left; `padding` marks those tokens."""

    pixels: Tensor  # float (B, V, 3, size, size); (1, all views, ...) where windows have different numbers of them
    token_ids: Tensor  # int64 (B, S)
    padding: Tensor  # bool (B, S), True where padded
    state: Tensor  # float (B, state_dim), normalised
    prefix: Tensor  # float (B, max_prefix, dim), normalised: first actions of the chunk, where they are decided
    decided: Tensor  # bool (B, max_prefix)
    # Of a flow in training: K chunks a window on their way from noise (time 0) to actions (time 1).
    noisy: Tensor = torch.empty(0)  # float (B, K, horizon, dim)
    time: Tensor = torch.empty(0)  # float (B, K, horizon)


class Output(NamedTuple):
    """What the policy answers, and the hidden states that distillation aligns."""

    # Normalised (B, horizon, dim); where tokens are written, logits (B, S, tokens) of what follows; where the batch has
    # noisy actions, their velocities (B, K, horizon, dim).
    actions: Tensor
    vision_states: list[Tensor]  # each (B * V, P, H)
    decoder_states: list[Tensor]  # each (B, S, H)
    proprio_state: Tensor  # (B, H): the final state at the proprio token


def _siglip(config: VisionConfig | FlowConfig, attention: str, **image: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        layer_norm_eps=config.layer_norm_eps,
        hidden_act="gelu_pytorch_tanh",
        attn_implementation=attention,
        **image,
    )


class Film(nn.Module):
    """FiLM of one layer of the tower (OpenVLA-OFT+, arXiv 2502.19645): x becomes (1 + scale) * x + shift, two linear
    functions of the mean embedding of what is said. They begin at zero, so that the tower begins as it was."""

    def __init__(self, vision: VisionConfig, language: LanguageConfig) -> None:
        super().__init__()
        self.scale = nn.Linear(language.hidden_size, vision.hidden_size)
        self.shift = nn.Linear(language.hidden_size, vision.hidden_size)

    def forward(self, told: Tensor) -> tuple[Tensor, Tensor]:
        """(N, language H) -> scale and shift (N, 1, vision H), for every patch the same."""
        return self.scale(told)[:, None].float(), self.shift(told)[:, None].float()


class VisionLayer(SiglipEncoderLayer):
    """A layer of SigLIP with a place for FiLM: between attention and feed-forward, as in OpenVLA-OFT."""

    def forward(self, x: Tensor, film: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), attention_mask=None)[0]
        if film is not None:
            scale, shift = film
            x = (1 + scale) * x + shift
        return x + self.mlp(self.layer_norm2(x))


class VisionTower(nn.Module):
    """SigLIP without its final norm: the features are the output of the last layer."""

    def __init__(self, config: VisionConfig, attention: str = ATTENTION) -> None:
        super().__init__()
        siglip = _siglip(config, attention, image_size=config.image_size, patch_size=config.patch_size)
        self.vision_model = nn.Module()
        self.vision_model.embeddings = SiglipVisionEmbeddings(siglip)
        self.vision_model.encoder = nn.Module()
        self.vision_model.encoder.layers = nn.ModuleList(VisionLayer(siglip) for _ in range(config.num_layers))

    def forward(self, pixels: Tensor, film: Iterable[tuple[Tensor, Tensor]] = ()) -> list[Tensor]:
        """Hidden states (B, P, H) before the first and after every layer, which `film` modulates where there is any."""
        states = [self.vision_model.embeddings(pixels)]
        for layer, modulation in zip_longest(self.vision_model.encoder.layers, film):
            states.append(layer(states[-1], modulation))
        return states


class Connector(nn.Module):
    """Two linear layers with an exact GELU between them, from vision width to language width."""

    def __init__(self, vision: VisionConfig, language: LanguageConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision.hidden_size, language.hidden_size)
        self.linear_2 = nn.Linear(language.hidden_size, language.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(x)))


class Decoder(nn.Module):
    """BitNet decoder over embeddings, bidirectional or causal."""

    def __init__(self, config: LanguageConfig, attention: str = ATTENTION) -> None:
        super().__init__()
        self.bidirectional = config.bidirectional
        bitnet = BitNetConfig(
            vocab_size=config.vocab_size,
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            hidden_act="relu2",
            attn_implementation=attention,
        )
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(BitNetDecoderLayer(bitnet, i) for i in range(config.num_layers))
        self.model.norm = BitNetRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = BitNetRotaryEmbedding(bitnet)

    def forward(self, embeddings: Tensor, padding: Tensor) -> list[Tensor]:
        """Hidden states (B, S, H) before the first and after every layer; the last one is normalised."""
        length = embeddings.shape[1]
        positions = torch.arange(length, device=embeddings.device)[None]
        allowed = ~padding[:, None, None, :].expand(-1, 1, length, -1)
        if not self.bidirectional:
            allowed = allowed & (positions[0][:, None] >= positions[0])
        # A padded token may see itself: a row without any allowed key would become NaN.
        allowed = allowed | torch.eye(length, dtype=torch.bool, device=embeddings.device)
        mask = torch.zeros(allowed.shape, dtype=embeddings.dtype, device=embeddings.device)
        mask = mask.masked_fill(~allowed, torch.finfo(embeddings.dtype).min)
        rotary = self.rotary(embeddings, positions)
        states = [embeddings]
        for layer in self.model.layers:
            states.append(layer(states[-1], attention_mask=mask, position_embeddings=rotary))
        states[-1] = self.model.norm(states[-1])
        return states


class ProprioProjector(nn.Module):
    """The normalised state as one token of the decoder."""

    def __init__(self, action: ActionConfig, language: LanguageConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(action.state_dim, language.hidden_size)
        self.fc2 = nn.Linear(language.hidden_size, language.hidden_size)

    def forward(self, state: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(state)))


class _ResidualBlock(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class ActionHead(nn.Module):
    """One step of the chunk from the states of its slots: (..., slots_per_step * H) -> (..., dim)."""

    def __init__(self, action: ActionConfig, language: LanguageConfig) -> None:
        super().__init__()
        inputs, hidden = action.slots_per_step * language.hidden_size, action.head_hidden_size
        self.model = nn.Module()
        self.model.layer_norm1 = nn.LayerNorm(inputs)
        self.model.fc1 = nn.Linear(inputs, hidden)
        self.model.mlp_resnet_blocks = nn.ModuleList(_ResidualBlock(hidden) for _ in range(action.head_blocks))
        self.model.layer_norm2 = nn.LayerNorm(hidden)
        self.model.fc2 = nn.Linear(hidden, action.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.model.fc1(self.model.layer_norm1(x)))
        for block in self.model.mlp_resnet_blocks:
            x = block(x)
        return self.model.fc2(self.model.layer_norm2(x))


class FlowHead(nn.Module):
    """Flow matching (arXiv 2210.02747) as an action expert: transformer layers over the steps of the chunk.

    What enters for a step is the sum of what the decoder says about it, its noisy action and its time. Decided actions
    stand at time 1 from the beginning, so that the others continue them (arXiv 2512.05964). The noise that chunks begin
    as is drawn once, with the weights, and kept with them: the same observation always gets the same chunk.
    """

    noise: Tensor
    frequencies: Tensor

    def __init__(self, action: ActionConfig, flow: FlowConfig, language: LanguageConfig, attention: str) -> None:
        super().__init__()
        slots, width, eps = action.slots_per_step * language.hidden_size, flow.hidden_size, flow.layer_norm_eps
        self.steps = flow.steps
        self.register_buffer("noise", torch.randn(action.horizon, action.dim))
        self.register_buffer("frequencies", torch.tensor(flow.frequencies, dtype=torch.float64), persistent=False)
        self.position_embedding = nn.Parameter(torch.zeros(action.horizon, width))
        self.condition_norm = nn.LayerNorm(slots, eps)
        self.condition = nn.Linear(slots, width)
        self.action_in = nn.Linear(action.dim, width)
        self.time_in = nn.Linear(width, width)
        siglip = _siglip(flow, attention)
        self.layers = nn.ModuleList(SiglipEncoderLayer(siglip) for _ in range(flow.num_layers))
        self.norm = nn.LayerNorm(width, eps)
        self.action_out = nn.Linear(width, action.dim)

    def forward(self, states: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Velocities (B, K, horizon, dim) of `noisy` at `time` (B, K, horizon), given states (B, horizon, slots)."""
        angles = time[..., None].double() * self.frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).float()
        given = self.condition(self.condition_norm(states)) + self.position_embedding
        x = (given[:, None] + self.action_in(noisy) + self.time_in(waves)).flatten(0, 1)
        for layer in self.layers:
            x = layer(x, attention_mask=None)
        return self.action_out(self.norm(x)).view_as(noisy)

    def sample(self, states: Tensor, prefix: Tensor, decided: Tensor) -> Tensor:
        """The chunk (B, horizon, dim) that the noise flows to; of `prefix` (B, max_prefix, dim) what is `decided`."""
        chunk, most = self.noise.repeat(len(states), 1, 1), prefix.shape[1]
        chunk[:, :most] = torch.where(decided[..., None], prefix, chunk[:, :most])
        decided = nn.functional.pad(decided, (0, chunk.shape[1] - most))
        for step in range(self.steps):
            time = torch.full_like(chunk[..., 0], step / self.steps).masked_fill(decided, 1)
            velocity = self(states, chunk[:, None], time[:, None])[:, 0]
            chunk = chunk + velocity.masked_fill(decided[..., None], 0) / self.steps
        return chunk


class Backbone(nn.Module):
    """What a policy and a vision-language model share. The embeddings of `image_id` are replaced by those of images."""

    def __init__(self, vision: VisionConfig, language: LanguageConfig, image_id: int, attention: str) -> None:
        super().__init__()
        self.image_id = image_id
        self.vision_tower = VisionTower(vision, attention)
        self.multi_modal_projector = Connector(vision, language)
        self.language_model = Decoder(language, attention)

    def embed(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Embeddings (B, S, H) of tokens and images, and the states of the vision tower."""
        embeddings = self.language_model.model.embed_tokens(batch.token_ids)
        vision_states = self.vision_tower(batch.pixels.flatten(0, 1), self._film(batch, embeddings))
        images = self.multi_modal_projector(vision_states[-1])
        is_image = (batch.token_ids == self.image_id)[..., None]
        return embeddings.masked_scatter(is_image, images.to(embeddings.dtype)), vision_states

    def _film(self, batch: Batch, embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Scale and shift of each image (B * V, 1, H) in each layer of the tower; none without FiLM."""
        return []

    def _begin(self, config: PolicyConfig | LanguageModelConfig, vision: VisionConfig) -> None:
        """Once every part is there: random weights, and ternary layers where the configuration says so."""
        self.apply(_initialize)
        if config.precision == "ternary":
            if vision.ternary:
                make_ternary(self.vision_tower.vision_model.encoder)
            make_ternary(self.language_model.model.layers)


class VisionLanguageModel(Backbone):
    """Answers questions about images; `actions` of its output are the logits of the next token."""

    def __init__(self, config: LanguageModelConfig, image_id: int, attention: str = ATTENTION) -> None:
        if config.vision is None:
            raise ValueError(f"{config.name} sees no images")
        super().__init__(config.vision, config.language, image_id, attention)
        self.config = config
        if not config.tied:
            self.language_model.lm_head = nn.Linear(config.language.hidden_size, config.language.vocab_size, bias=False)
        self._begin(config, config.vision)

    def forward(self, batch: Batch) -> Output:
        embeddings, vision_states = self.embed(batch)
        states = self.language_model(embeddings, batch.padding)
        head = self.language_model.model.embed_tokens if self.config.tied else self.language_model.lm_head
        logits = nn.functional.linear(states[-1], head.weight)
        return Output(logits, vision_states, states, proprio_state=states[-1][:, -1])


class BitVLA(Backbone):
    """The whole policy. `image_id` and `proprio_id` are the token ids whose embeddings the inputs replace.

    A policy that writes its actions as tokens has a language head for those in place of projectors and action head.
    """

    def __init__(self, config: PolicyConfig, image_id: int, proprio_id: int, attention: str = ATTENTION) -> None:
        super().__init__(config.vision, config.language, image_id, attention)
        self.config, self.proprio_id = config, proprio_id
        if config.action.bins:
            self.language_model.lm_head = nn.Linear(config.language.hidden_size, config.action.bins, bias=False)
        else:
            self.proprio_projector = ProprioProjector(config.action, config.language)
            flow = config.action.flow
            self.action_head: nn.Module = (
                ActionHead(config.action, config.language)
                if flow is None
                else FlowHead(config.action, flow, config.language, attention)
            )
        if config.action.max_prefix:
            self.prefix_projector = nn.Linear(
                config.action.dim, config.action.slots_per_step * config.language.hidden_size
            )
        # The last part: the others begin with the weights that they have without it.
        self.film = nn.ModuleList(
            Film(config.vision, config.language) for _ in range(config.vision.num_layers if config.vision.film else 0)
        )
        self._begin(config, config.vision)
        if config.precision == "ternary" and config.action.flow and config.action.flow.ternary:
            make_ternary(self.action_head.layers)

    def forward(self, batch: Batch) -> Output:
        action = self.config.action
        embeddings, vision_states = self.embed(batch)
        if action.bins:
            decoder_states = self.language_model(embeddings, batch.padding)
            logits = self.language_model.lm_head(decoder_states[-1])
            return Output(logits, vision_states, decoder_states, proprio_state=decoder_states[-1][:, -1])
        slots = embeddings[:, -1 - action.num_slots : -1]
        slots[:] = 0  # told apart by position alone
        if action.max_prefix:  # decided actions stand in the slots of their steps
            given = self.prefix_projector(batch.prefix) * batch.decided[..., None]
            slots[:, : action.max_prefix * action.slots_per_step] = given.reshape(len(given), -1, slots.shape[-1]).to(
                slots.dtype
            )
        is_proprio = (batch.token_ids == self.proprio_id)[..., None]
        proprio = self.proprio_projector(batch.state).to(embeddings.dtype)
        embeddings = torch.where(is_proprio, proprio[:, None], embeddings)

        decoder_states = self.language_model(embeddings, batch.padding)
        # The state that answers a slot stands one position before it, as in the reference.
        answers = decoder_states[-1][:, -2 - action.num_slots : -2].reshape(len(batch.state), action.horizon, -1)
        if action.flow is None:
            actions = self.action_head(answers)
        elif batch.time.numel():
            actions = self.action_head(answers, batch.noisy, batch.time)
        else:
            actions = self.action_head.sample(answers, batch.prefix, batch.decided)
        proprio_state = (decoder_states[-1] * is_proprio).sum(1)
        return Output(actions, vision_states, decoder_states, proprio_state)

    def _film(self, batch: Batch, embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
        if not self.film:
            return []
        ids, config = batch.token_ids, self.config
        is_image = ids == self.image_id
        # The text: template, instruction and stop token, but none of the actions, slots or tokens, to be answered.
        is_text = ~(is_image | batch.padding | (ids == self.proprio_id))
        is_text &= ids < config.language.vocab_size - config.action.bins
        is_text[:, -1 - config.action.num_slots : -1] = False
        told = (embeddings * is_text[..., None]).sum(dim=1) / is_text.sum(dim=1, keepdim=True)
        views = is_image.sum(dim=1) // config.vision.num_patches
        told = told.repeat_interleave(views, dim=0, output_size=batch.pixels.shape[:2].numel())
        return [film(told) for film in self.film]


def layers(network: nn.Module) -> list[GradientCheckpointingLayer]:
    """The transformer layers of a network or of a part of it, in order."""
    return [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_activations(network: nn.Module) -> None:
    """Keep only what enters each layer; the backward pass computes what is in it again."""
    for layer in layers(network):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        fan_in = module.weight[0].numel()
        nn.init.normal_(module.weight, std=fan_in**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Film):  # after its linear layers
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02 if module.weight.shape[0] <= 4096 else 0.01)
