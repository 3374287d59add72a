"""Ask a running server for chunks with the real `openpi-client` from PyPI. In an environment of its own:

pip install openpi-client typing_extensions  # openpi-client 0.1.2 forgets to ask for the second
bitvla serve src/bitvla/policies/metaworld-mt10-nano.safetensors --protocol openpi
python tests/manual/check_openpi_client.py localhost 8000
"""

import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def main(host: str, port: int) -> None:
    policy = WebsocketClientPolicy(host, port)
    metadata = policy.get_server_metadata()
    random = np.random.default_rng(0)
    observation = {
        f"observation/{camera['name']}": random.integers(0, 256, (camera["height"], camera["width"], 3), np.uint8)
        for camera in metadata["cameras"]
    }
    observation |= {"observation/state": np.zeros(len(metadata["state"]["names"]), np.float32) + 0.1}
    observation |= {"prompt": "open the drawer"}
    for _ in range(3):
        answer = policy.infer(observation)
        assert answer["actions"].shape == (metadata["horizon"], len(metadata["action"]["names"]))
        assert answer["actions"].dtype == np.float32
        assert np.isfinite(answer["actions"]).all()
    broker = ActionChunkBroker(policy, metadata["execute_horizon"])
    played = [broker.infer(observation)["actions"] for _ in range(2 * metadata["execute_horizon"])]
    assert np.array_equal(played[0], answer["actions"][0])
    refusal = ""
    try:
        policy.infer(observation | {"observation/left_image": observation["prompt"]})
    except RuntimeError as error:
        refusal = str(error)
    assert "left_image" in refusal, "an unknown camera was taken"
    assert np.array_equal(policy.infer(observation)["actions"], answer["actions"])
    print(f"openpi-client: {metadata['name']} answered; {answer['server_timing']}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
