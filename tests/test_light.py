"""The robot's side works where PyTorch, simulators and every extra are missing, and starts quickly.

pytest tests/test_light.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import pack_random, tiny_config

# What only extras bring; None in sys.modules makes `import` of it fail.
BLOCKED = [
    "torch", "transformers", "accelerate", "metaworld", "mujoco", "gymnasium", "scipy", "matplotlib", "jinja2",
    "pyarrow", "av", "huggingface_hub", "websockets", "msgpack", "prometheus_client", "grpc", "google", "zmq",
]  # fmt: skip

RUN = """
import json, sys, time
sys.modules.update(dict.fromkeys(json.loads(sys.argv[2])))
start = time.perf_counter()
import bitvla
light = time.perf_counter()
assert "numpy" not in sys.modules, "import bitvla alone must stay immediate"
policy = bitvla.load(sys.argv[1])
loaded = time.perf_counter()
from bitvla.runtime.verify import golden_traces, verify
observation, expected = next(golden_traces(policy.bundle))
assert (policy.act(observation) == expected).all()
acted = time.perf_counter()
assert verify(sys.argv[1])["passed"]
from bitvla.runtime.inspect import inspect
inspect(sys.argv[1])
from bitvla.doctor import doctor
doctor()
import bitvla.convert.pack
import bitvla.robot.run
import bitvla.robot.lerobot
print(json.dumps({"import_ms": 1e3 * (light - start), "load_ms": 1e3 * (loaded - light),
                  "first_call_ms": 1e3 * (acted - loaded)}))
"""


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_random(tmp_path_factory.mktemp("policy"), tiny_config())


def test_a_policy_runs_without_any_extra(policy_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(policy_file), json.dumps(BLOCKED)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # times are reported, not asserted: they depend on the machine


def test_running_a_policy_brings_in_nothing_heavy(policy_file: Path) -> None:
    """The extras are installed here, so an import of one would succeed and go unnoticed on the developer's machine."""
    code = "import bitvla, sys; bitvla.load(sys.argv[1]); print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code, str(policy_file)], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {*BLOCKED, "rich", "safetensors"}
