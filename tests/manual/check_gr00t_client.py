"""Ask a running server for chunks with the `PolicyClient` of Isaac-GR00T. In an environment of its own:

pip install msgpack pyzmq numpy
git clone https://github.com/NVIDIA/Isaac-GR00T
bitvla serve src/bitvla/policies/metaworld-mt10-nano.safetensors --protocol gr00t
PYTHONPATH=Isaac-GR00T python tests/manual/check_gr00t_client.py localhost 5555
"""

import sys

import numpy as np
from gr00t.policy.server_client import PolicyClient


def main(host: str, port: int) -> None:
    policy = PolicyClient(host, port, strict=False)
    assert policy.ping()
    modalities = policy.get_modality_config()
    random = np.random.default_rng(0)
    video = {key: random.integers(0, 256, (1, 1, 128, 128, 3), np.uint8) for key in modalities["video"].modality_keys}
    state = {key: np.full((1, 1, 4), 0.1, np.float32) for key in modalities["state"].modality_keys}
    language = {key: [["open the drawer"]] for key in modalities["language"].modality_keys}
    observation = {"video": video, "state": state, "language": language}
    policy.reset()
    actions, _ = policy.get_action(observation)
    (key,) = modalities["action"].modality_keys
    horizon = len(modalities["action"].delta_indices)
    assert actions[key].shape[:2] == (1, horizon)
    assert actions[key].dtype == np.float32
    assert np.isfinite(actions[key]).all()
    assert np.array_equal(policy.get_action(observation)[0][key], actions[key])
    refusal = ""
    try:
        policy.get_action(observation | {"video": {"left": next(iter(video.values()))}})
    except RuntimeError as error:
        refusal = str(error)
    assert refusal, "an unknown camera was taken"
    assert np.array_equal(policy.get_action(observation)[0][key], actions[key])
    print(f"PolicyClient: {horizon} actions of {actions[key].shape[-1]} values; refused: {refusal}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
