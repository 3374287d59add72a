"""Training of a vision-language model on conversations: stages `align` and `instruct`, and `distill` of its tower."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer

from bitvla.config import LanguageModelConfig, PolicyConfig, check
from bitvla.convert.source import Source
from bitvla.data.llava import LlavaDataset
from bitvla.errors import BitvlaError
from bitvla.model.checkpoint import fill, load_language_network
from bitvla.model.network import VisionLanguageModel
from bitvla.processing.prompt import Chat, train_tokenizer
from bitvla.train import stages
from bitvla.train.config import TrainConfig
from bitvla.train.conversations import Conversations
from bitvla.train.loop import Trainer, check_frozen, check_same, shard


class LanguageTrainer(Trainer):
    """The loop over conversations in place of demonstrations."""

    def __init__(
        self,
        stage: str,
        config: TrainConfig,
        data: LlavaDataset,
        out: Path,
        start: Path | None,
        teacher: Path | None,
        opened: Mapping[Path, Source],
    ) -> None:
        self.data = data
        super().__init__(stage, config, [], out, start, teacher, opened, None)

    def _policy(self, start: Source | None, sentences: list[str] | None) -> tuple[VisionLanguageModel, Chat, Tokenizer]:
        config = start_config(self.stage, self.config, None if start is None else start.config)
        if start is not None and isinstance(start.config, LanguageModelConfig):
            if start.lacks and self.config.model is not None:
                _check_section(self.config.model, start)
            network, chat = load_language_network(start, config)
            tokenizer = chat.tokenizer
        else:
            texts = {text for entry in self.data.entries for turn in entry.turns for text in (turn.prompt, turn.answer)}
            tokenizer = _new_tokenizer(config, sorted(texts))
            chat = Chat(config, tokenizer)
            network = VisionLanguageModel(config, chat.image_id)
            if start is not None:
                fill(network, start, part="vision_tower.")
        stages.freeze(self.stage, self.config, network)
        of_policy = start is not None and isinstance(start.config, PolicyConfig)
        check_frozen(self.stage, network, start, part="vision_tower." if of_policy else "")
        return network, chat, tokenizer

    def _objective(self, teacher: Source | None) -> stages.Objective:
        if teacher is None:
            return stages.likelihood
        student, followed = self.network.config, teacher.config
        assert isinstance(followed, LanguageModelConfig)
        check_same("the student's vision", student.vision, followed.vision, teacher, ("ternary",))
        check_same("the student's image", student.image, followed.image, teacher)
        tower: Any = load_language_network(teacher)[0].vision_tower.requires_grad_(False).eval()
        tower.to(self.accelerator.device)
        if self._sharded:
            shard(tower)
        return stages.distill_tower(self.config, torch.compile(tower) if self.config.compile else tower)

    def _validation_objective(self) -> stages.Objective:
        return stages.likelihood

    def _windows(self, split: str, **shard: int) -> Conversations:
        config: LanguageModelConfig = self.network.config
        assert config.vision is not None
        assert config.image is not None
        return Conversations(
            self.data,
            config.vision,
            config.image,
            self.prompt,
            batch_size=self.config.batch_size,
            max_tokens=min(self.config.max_tokens, config.language.max_positions),
            seed=self.config.seed,
            augmentation=self.config.augmentation if split == "train" else None,
            split=split,
            **shard,
        )

    def _data(self) -> list[dict[str, Any]]:
        limit = {} if self.data.limit is None else {"cache_bytes": self.data.limit}  # it decides the order
        return [{"digest": self.data.digest, "conversations": len(self.data.entries), **limit}]

    def _golden(self) -> None:
        return None


def start_config(
    stage: str, config: TrainConfig, stored: PolicyConfig | LanguageModelConfig | None
) -> LanguageModelConfig:
    """The model that a stage trains: the `stored` one, or a new one, perhaps with the tower of a `stored` policy."""
    if isinstance(stored, LanguageModelConfig):
        model = stored
    elif config.model is not None:
        model = config.model
    else:
        raise BitvlaError(
            "the configuration has no [model] section: give the model to go on from (--init, or --teacher to distill), "
            "or describe a new one there"
        )
    if model.vision is None:
        raise BitvlaError(f"the model '{model.name}' has no vision tower; describe one in [model]")
    if isinstance(stored, PolicyConfig):
        tower = msgspec.structs.replace(stored.vision, ternary=model.vision.ternary)
        if tower != model.vision:
            raise BitvlaError(
                f"'{stored.name}' has another vision tower ({tower}) than the [model] section ({model.vision})"
            )
    vision = msgspec.structs.replace(model.vision, ternary=True) if stage == "distill" else model.vision
    return check(msgspec.structs.replace(model, vision=vision, precision=config.precision))


def _check_section(new: LanguageModelConfig, start: Source) -> None:
    """What two checkpoints are joined to is said by them; a [model] section must not say otherwise."""
    for part in ("vision", "language", "image", "chat"):
        check_same(f"model.{part}", getattr(new, part), getattr(start.config, part), start)
    check_same("model", new, start.config, start, ("name", "precision"))


def _new_tokenizer(config: LanguageModelConfig, texts: list[str]) -> Tokenizer:
    chat = config.chat
    # Padding, action slots and the place of the state are a policy's, which may begin as this model.
    specials = ["<|pad|>", "<|slot|>", "<proprio_pad>", chat.image_token, *chat.stop_tokens]
    specials += re.findall(r"<\|\w+\|>", chat.begin + chat.turn + chat.turn_with_images)
    return train_tokenizer(texts, config.language.vocab_size, list(dict.fromkeys(specials)))
