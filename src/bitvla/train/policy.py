"""What a policy's stages train and on what: `localize`, `pretrain` and `finetune`, and `distill` of a policy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from bitvla.config import PolicyConfig
from bitvla.convert.source import Source
from bitvla.data.lerobot import LeRobotDataset
from bitvla.errors import BitvlaError
from bitvla.model.checkpoint import golden_tensors, load_network, tokenizer_of
from bitvla.model.lora import add_adapters
from bitvla.model.network import BitVLA
from bitvla.model.policy import TorchPolicy
from bitvla.processing.prompt import Prompt, train_tokenizer
from bitvla.train import stages
from bitvla.train.batches import Mixture, Windows
from bitvla.train.config import TrainConfig, for_dataset, policy_config
from bitvla.train.starts import check_data, check_follows, check_frozen, start_policy

GOLDEN_OBSERVATIONS = 2


class PolicyLearner:
    """A policy that learns from demonstrations (a `bitvla.train.loop.Learner`).

    The first of `datasets` is of its robot; its tokenizer, where it is new, is made for `sentences`, or for theirs.
    """

    def __init__(
        self,
        stage: str,
        config: TrainConfig,
        datasets: list[LeRobotDataset],
        start: Source | None,
        sentences: list[str] | None,
    ) -> None:
        self._stage, self._config, self._datasets = stage, config, datasets
        # Not frames: where tasks are balanced, those of short ones count several times.
        self.unit = f"windows an epoch, of {sum(dataset.num_episodes for dataset in datasets)} episodes"
        dataset = datasets[0]
        policy = start_policy(stage, config, start, lambda new: policy_config(new, dataset, config.precision))
        if start is not None:
            check_data(policy, dataset, start)
            self.tokenizer = tokenizer_of(start)
            self.network, self._prompt = load_network(start, policy)
        else:
            corpus = sentences or [text for dataset in datasets for text in dataset.task_strings]
            self.tokenizer = new_tokenizer(policy, corpus)
            self._prompt = Prompt(policy, self.tokenizer)
            self.network = BitVLA(policy, self._prompt.image_id, self._prompt.proprio_id)
        stages.freeze(stage, config, self.network)
        if config.lora_rank:
            add_adapters(self.network, config.lora_rank, config.lora_alpha)
        check_frozen(stage, self.network, start)
        # What a simulator knows of the scene.
        positions = 0 if dataset.environment_state is None else dataset.environment_state.shape[1]
        keypoints = 0 if dataset.keypoints is None else dataset.keypoints.shape[2]
        if stage == "localize" and not keypoints:
            raise BitvlaError(f"stage 'localize' needs observation.keypoints, which {dataset.root} lacks")
        self.auxiliary = stages.AuxiliaryHead(policy, positions, keypoints)
        # Without gradients where nothing is asked of them, as several processes demand.
        acts = stage in ("finetune", "distill")
        self.auxiliary.linear.requires_grad_(bool(positions and config.auxiliary_weight and acts))
        self.auxiliary.points.requires_grad_(bool(keypoints and config.keypoint_weight and stage != "pretrain"))

    def teacher(self, source: Source) -> nn.Module:
        check_follows(self.network.config, source)
        if self.tokenizer.to_str() != tokenizer_of(source).to_str():
            raise BitvlaError(f"the student has another tokenizer than its teacher {source.folder}; leave out --init")
        return load_network(source)[0]

    def objective(self, teacher: stages.Network | None) -> stages.Objective:
        return stages.objective(self._stage, self._config, self.auxiliary, teacher)

    def windows(self, split: str, **shard: int) -> Windows | Mixture:
        config, policy = self._config, self.network.config
        policies = [policy, *(for_dataset(policy, dataset) for dataset in self._datasets[1:])]
        trains = split == "train"
        parts = [
            Windows(
                dataset,
                own,
                Prompt(own, self.tokenizer),
                batch_size=config.batch_size,
                seed=config.seed,
                augmentation=config.augmentation if trains else None,
                prefix_dropout=config.prefix_dropout if trains else 1.0,
                flow_samples=config.flow_samples if trains else 0,
                split=split,
                balance_tasks=config.balance_tasks,
                **shard,
            )
            for dataset, own in zip(self._datasets, policies, strict=True)
        ]
        if self._stage != "pretrain":
            return parts[0]
        return Mixture(parts, config.mixture, policy, batch_size=config.batch_size, seed=config.seed, **shard)

    def data(self) -> list[dict[str, Any]]:
        return [
            {
                # The exact statistics of every frame change when any value does, and are cheap to read.
                "digest": hashlib.sha256(dataset.stored_statistics()).hexdigest(),
                "episodes": dataset.num_episodes,
                "frames": dataset.num_frames,
                # Which decides the order of the frames.
                **({} if dataset.pictures.limit is None else {"cache_bytes": dataset.pictures.limit}),
            }
            for dataset in self._datasets
        ]

    def golden(self, network: BitVLA) -> tuple[dict[str, torch.Tensor], list[str]]:
        dataset, policy = self._datasets[0], TorchPolicy(network, self._prompt)
        cameras = [camera.name for camera in policy.config.processing.cameras]
        state = {"state": dataset.state} if policy.config.action.state_dim else {}
        first_frames = [begin for begin, _ in dataset.episode_ranges]
        chosen = first_frames[:: max(1, len(first_frames) // GOLDEN_OBSERVATIONS)][:GOLDEN_OBSERVATIONS]
        observations = [
            {
                "images": {camera: dataset.images(camera)[frame] for camera in cameras},
                **{name: values[frame] for name, values in state.items()},
                "instruction": dataset.task_strings[dataset.episode_index[frame]],
            }
            for frame in chosen
        ]
        answers = [policy.act(observation) for observation in observations]
        return golden_tensors(observations, answers)


def new_tokenizer(config: PolicyConfig, corpus: Iterable[str]) -> Tokenizer:
    """The tokenizer of a new policy, made for the sentences that it will be told."""
    template = config.processing.prompt
    specials = [template.pad_token, "<|slot|>", template.image_token, template.proprio_token, template.stop_token]
    specials += [token for token in ("<|begin_of_text|>", "<|eot_id|>") if token in template.template]
    return train_tokenizer(sorted(set(corpus)), config.language.vocab_size - config.action.bins, specials)
