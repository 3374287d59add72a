"""Tiny policies for tests: configurations, and random training checkpoints written with NumPy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from bitvla.bundle import tensor_specs
from bitvla.config import (
    ActionConfig,
    Camera,
    FlowConfig,
    ImageProcessing,
    LanguageConfig,
    PolicyConfig,
    ProcessingConfig,
    PromptConfig,
    Statistics,
    VisionConfig,
    check,
    to_dict,
)
from bitvla.processing.prompt import train_tokenizer

INSTRUCTIONS = ("open the drawer", "push the button", "reach the red goal")


def tiny_config(**changes: Any) -> PolicyConfig:
    """A policy whose every size differs from the others, so that a transposed shape cannot pass. See `nano_config`."""
    config = PolicyConfig(
        name="tiny",
        vision=VisionConfig(
            image_size=28, patch_size=7, hidden_size=40, intermediate_size=72, num_layers=2, num_heads=2
        ),
        language=LanguageConfig(
            vocab_size=300, hidden_size=48, intermediate_size=88, num_layers=2, num_heads=4, num_kv_heads=2
        ),
        action=ActionConfig(horizon=5, dim=4, state_dim=3, slots_per_step=2, head_hidden_size=56, head_blocks=1),
        processing=processing_config(
            cameras=(Camera(name="corner", height=36, width=32), Camera(name="wrist", height=30, width=30)),
            state_dim=3,
            action_dim=4,
            execute_horizon=3,
        ),
    )
    return check(msgspec.structs.replace(config, **changes))


def token_config() -> PolicyConfig:
    """A tiny policy that sees with a full-precision tower, takes no state and writes its actions as tokens."""
    processing = processing_config(cameras=tiny_config().processing.cameras, state_dim=0, action_dim=4)
    prompt = msgspec.structs.replace(processing.prompt, template="{images}{instruction}<|end_of_text|>")
    return tiny_config(
        vision=msgspec.structs.replace(tiny_config().vision, ternary=False),
        language=msgspec.structs.replace(tiny_config().language, bidirectional=False),
        action=ActionConfig(horizon=1, dim=4, state_dim=0, slots_per_step=0, head_hidden_size=0, head_blocks=0, bins=9),
        processing=msgspec.structs.replace(processing, prompt=prompt),
    )


def flow_config(**changes: Any) -> PolicyConfig:
    """A tiny policy with a flow-matching head, in full precision unless `changes` of its FlowConfig say otherwise."""
    flow = FlowConfig(hidden_size=24, intermediate_size=64, num_layers=2, num_heads=3, steps=3)
    action = msgspec.structs.replace(
        tiny_config().action, head_hidden_size=0, head_blocks=0, flow=msgspec.structs.replace(flow, **changes)
    )
    return tiny_config(action=action)


def with_prompt(config: PolicyConfig, template: str) -> PolicyConfig:
    prompt = msgspec.structs.replace(config.processing.prompt, template=template)
    return msgspec.structs.replace(config, processing=msgspec.structs.replace(config.processing, prompt=prompt))


def nano_config() -> PolicyConfig:
    """A policy of the size of the shipped one, for measurements."""
    return check(
        PolicyConfig(
            name="nano",
            vision=VisionConfig(
                image_size=112, patch_size=16, hidden_size=192, intermediate_size=768, num_layers=6, num_heads=6
            ),
            language=LanguageConfig(
                vocab_size=512, hidden_size=192, intermediate_size=512, num_layers=4, num_heads=6, num_kv_heads=3
            ),
            action=ActionConfig(horizon=16, dim=4, state_dim=4, slots_per_step=1, head_hidden_size=256, head_blocks=1),
            processing=processing_config(
                cameras=(Camera(name="corner", height=128, width=128), Camera(name="wrist", height=128, width=128)),
                state_dim=4,
                action_dim=4,
                execute_horizon=8,
            ),
        )
    )


def processing_config(
    cameras: tuple[Camera, ...], state_dim: int, action_dim: int, execute_horizon: int = 1, **changes: Any
) -> ProcessingConfig:
    return ProcessingConfig(
        cameras=cameras,
        image=ImageProcessing(),
        prompt=PromptConfig(template="{images}<proprio_pad>{instruction}<|end_of_text|>", max_instruction_tokens=24),
        state=_statistics("s", state_dim),
        action=_statistics("a", action_dim),
        control_hz=20.0,
        execute_horizon=execute_horizon,
        **changes,
    )


def _statistics(prefix: str, size: int) -> Statistics:
    return Statistics(
        names=tuple(f"{prefix}{index}" for index in range(size)),
        units=("m",) * size,
        low=tuple(-0.5 - 0.25 * index for index in range(size)),
        high=tuple(0.75 + 0.5 * index for index in range(size)),
        mask=((True,) * size)[1:] + (False,) * min(size, 1),
    )


def random_weights(config: PolicyConfig, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Latent weights of a whole policy, scaled so that signals neither vanish nor explode."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, spec in tensor_specs(config).items():
        values = rng.standard_normal(spec.shape, dtype=np.float32)
        if spec.kind == "vector":
            is_gain = name.endswith("weight") and "position" not in name
            weights[name] = values * np.float32(0.1) + np.float32(is_gain)
        else:
            weights[name] = values / np.sqrt(np.prod(spec.shape[1:], dtype=np.float32))
    return weights


def write_random_checkpoint(path: Path, config: PolicyConfig, *, seed: int = 0, golden: int = 2) -> Path:
    """Write a training checkpoint folder with random weights; no PyTorch, hence no golden chunks. Returns `path`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(to_dict(config)))
    save_file(random_weights(config, seed), path / "model.safetensors")
    prompt = config.processing.prompt
    specials = (prompt.image_token, prompt.pad_token, prompt.proprio_token, prompt.stop_token)
    train_tokenizer(INSTRUCTIONS, config.language.vocab_size, specials).save(str(path / "tokenizer.json"))
    write_golden(path, config, [observation(config, seed=seed + index) for index in range(golden)])
    (path / "provenance.json").write_text(json.dumps({"stage": "random", "seed": seed}))
    return path


def write_golden(path: Path, config: PolicyConfig, observations: list[dict[str, Any]]) -> None:
    """Write golden.safetensors of a checkpoint folder; an observation may carry its "chunk"."""
    tensors = {}
    for index, seen in enumerate(observations):
        tensors |= {f"{index}.image.{name}": image for name, image in seen["images"].items()}
        tensors |= {f"{index}.{key}": seen[key] for key in ("state", "chunk") if key in seen}
    save_file(
        tensors,
        path / "golden.safetensors",
        metadata={"instructions": json.dumps([seen["instruction"] for seen in observations])},
    )


def observation(config: PolicyConfig, seed: int = 0) -> dict[str, Any]:
    """A random observation that fits `config`: what a robot would hand to `Policy.act`."""
    rng = np.random.default_rng(seed)
    seen = {
        "images": {
            camera.name: rng.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
            for camera in config.processing.cameras
        },
        "state": rng.uniform(-0.5, 0.5, config.action.state_dim).astype(np.float32),
        "instruction": INSTRUCTIONS[seed % len(INSTRUCTIONS)],
    }
    if not config.action.state_dim:
        del seen["state"]
    return seen


def pack_random(folder: Path, config: PolicyConfig, *, seed: int = 0, golden: int = 2, **options: Any) -> Path:
    """A policy file with random weights in `folder`; `options` are those of `bitvla.convert.pack.pack`."""
    from bitvla.convert.pack import pack

    checkpoint = write_random_checkpoint(folder / "checkpoint", config, seed=seed, golden=golden)
    pack(checkpoint, folder / "policy.safetensors", **options)
    return folder / "policy.safetensors"
