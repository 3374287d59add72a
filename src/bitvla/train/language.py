"""What the stages of a vision-language model train and on what: `align` and `instruct`, and `distill` of its tower."""

from __future__ import annotations

import re
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from bitvla.config import LanguageModelConfig
from bitvla.convert.source import Source
from bitvla.data.llava import LlavaDataset
from bitvla.model.checkpoint import fill, load_language_network
from bitvla.model.network import VisionLanguageModel
from bitvla.processing.prompt import Chat, train_tokenizer
from bitvla.train import stages
from bitvla.train.config import TrainConfig
from bitvla.train.conversations import Conversations
from bitvla.train.starts import check_follows, check_frozen, start_model


class LanguageLearner:
    """A vision-language model that learns from conversations (a `bitvla.train.loop.Learner`)."""

    def __init__(self, stage: str, config: TrainConfig, dataset: LlavaDataset, start: Source | None) -> None:
        self._config, self._dataset = config, dataset
        self.unit = "conversations"
        model = start_model(stage, config, start)
        if start is not None and isinstance(start.config, LanguageModelConfig):
            self.network, self._chat = load_language_network(start, model)
            self.tokenizer = self._chat.tokenizer
        else:
            texts = {text for entry in dataset.entries for turn in entry.turns for text in (turn.prompt, turn.answer)}
            self.tokenizer = _new_tokenizer(model, sorted(texts))
            self._chat = Chat(model, self.tokenizer)
            self.network = VisionLanguageModel(model, self._chat.image_id)
            if start is not None:
                fill(self.network, start, part="vision_tower.")
        stages.freeze(stage, config, self.network)
        check_frozen(stage, self.network, start)
        self.auxiliary = stages.AuxiliaryHead(model, 0, 0).requires_grad_(False)

    def teacher(self, source: Source) -> nn.Module:
        check_follows(self.network.config, source)
        return load_language_network(source)[0].vision_tower

    def objective(self, teacher: stages.Network | None) -> stages.Objective:
        if teacher is None:
            return stages.likelihood
        return stages.distill_tower(self._config, teacher, self.network.image_id)

    def windows(self, split: str, **shard: int) -> Conversations:
        config, model = self._config, self.network.config
        assert model.vision is not None
        assert model.image is not None
        return Conversations(
            self._dataset,
            model.vision,
            model.image,
            self._chat,
            batch_size=config.batch_size,
            max_tokens=min(config.max_tokens, model.language.max_positions),
            seed=config.seed,
            augmentation=config.augmentation if split == "train" else None,
            split=split,
            **shard,
        )

    def data(self) -> list[dict[str, Any]]:
        dataset = self._dataset
        limit = {} if dataset.limit is None else {"cache_bytes": dataset.limit}  # it decides the order
        return [{"digest": dataset.digest, "conversations": len(dataset.entries), **limit}]

    def golden(self, network: VisionLanguageModel) -> None:
        return None  # it does not act


def _new_tokenizer(config: LanguageModelConfig, texts: list[str]) -> Tokenizer:
    chat = config.chat
    # Padding, action slots and the place of the state are a policy's, which may begin as this model.
    specials = ["<|pad|>", "<|slot|>", "<proprio_pad>", chat.image_token, *chat.stop_tokens]
    specials += re.findall(r"<\|\w+\|>", chat.begin + chat.turn + chat.turn_with_images)
    return train_tokenizer(texts, config.language.vocab_size, list(dict.fromkeys(specials)))
