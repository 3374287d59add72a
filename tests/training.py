"""A tiny policy to train, and what a run logged; for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitvla.data.lerobot import LeRobotDataset
from bitvla.processing.prompt import Prompt
from bitvla.train.batches import Windows
from bitvla.train.config import Augmentation, load, policy_config
from bitvla.train.policy import new_tokenizer

POLICY = """
[policy]
name = "test"
vision = { image_size = 16, patch_size = 8, hidden_size = 16, intermediate_size = 32, num_layers = 2, num_heads = 2 }

action = { horizon = 3, dim = 3, state_dim = 3, slots_per_step = 1, head_hidden_size = 16, head_blocks = 1 }
image = { crop_area = 0.9 }
state_units = ["m", "m", "m"]
action_units = ["m", "m", "m"]
execute_horizon = 2

[policy.language]
vocab_size = 300
hidden_size = 32
intermediate_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 1
max_positions = 64

[policy.prompt]
template = "<|begin_of_text|>{images}<proprio_pad>{instruction}<|eot_id|>"
"""

# Without the heads that read what a simulator knows.
BLIND = {"auxiliary_weight": 0.0, "keypoint_weight": 0.0}

# A flow-matching head in place of its regression head.
FLOW = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2, "steps": 4}

# The same backbone, writing its actions as tokens.
TOKENS = (
    POLICY.replace("horizon = 3, dim = 3, state_dim = 3, slots_per_step = 1, head_hidden_size = 16, head_blocks = 1",
                   "bins = 16, horizon = 1, state_dim = 0, slots_per_step = 0, head_hidden_size = 0, head_blocks = 0, "
                   "dim = 3")
    .replace('state_units = ["m", "m", "m"]', "state_units = []")
    .replace("execute_horizon = 2", "execute_horizon = 1")
    .replace("max_positions = 64", "max_positions = 64\nbidirectional = false")
    .replace("<proprio_pad>", "")
)  # fmt: skip

# A vision-language model with the tower of POLICY.
MODEL = """
[model]
name = "test"
image = { crop_area = 0.9 }

[model.vision]
image_size = 16
patch_size = 8
hidden_size = 16
intermediate_size = 32
num_layers = 2
num_heads = 2
ternary = false

[model.language]
vocab_size = 400
hidden_size = 32
intermediate_size = 32
num_layers = 2
num_heads = 2
num_kv_heads = 1
max_positions = 256
bidirectional = false

[model.chat]
begin = "<|begin_of_text|>"
turn = "{prompt}<|eot_id|>"
turn_with_images = "{images}{prompt}<|eot_id|>"
stop_tokens = ["<|end_of_text|>"]
image_token = "<|image_pad|>"
"""


def write_config(folder: Path, policy: str = POLICY, **changes: object) -> Path:
    """A configuration of 8 steps that saves after 4 and logs every step, with `changes`."""
    heads = {} if "[model]" in policy or "bins = " in policy else dict.fromkeys(BLIND, 0.1)
    values = {
        "precision": "full",
        "steps": 8,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "mixed_precision": "no",
        "log_every": 1,
        "save_every": 4,
        "validation_batches": 1,
        **heads,
        **changes,
    }
    path = folder / f"config-{len(list(folder.glob('config-*')))}.toml"
    path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in values.items()) + policy)
    return path


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def losses_of(out: Path) -> dict[int, float]:
    """Training loss by step, as logged."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def windows(data: Path | LeRobotDataset, folder: Path, policy: str = POLICY, **options: Any) -> Windows:
    """Windows of 8 over `data` as a new policy would see them."""
    settings = load(write_config(folder, policy))
    dataset = data if isinstance(data, LeRobotDataset) else LeRobotDataset(data)
    config = policy_config(settings.policy, dataset, "full")
    prompt = Prompt(config, new_tokenizer(config, dataset.task_strings))
    options = {"augmentation": Augmentation(), **options}
    return Windows(dataset, config, prompt, batch_size=8, seed=3, **options)
