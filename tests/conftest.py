"""What every test shares: no time limit an example, and native settings as they were."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Tests run side by side, one a core: a library that starts a thread a core would only wait for its other threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with Ctrl-C ignored, and their children inherit that; tests of Ctrl-C need it heard.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow example on a loaded machine is no failure; how long tests take is pytest's business.
settings.register_profile("bitvla", deadline=None)
settings.load_profile("bitvla")


@pytest.fixture(autouse=True)
def _native_settings() -> Iterator[None]:
    """Instruction set and threads belong to the process, so a test gives back what it found."""
    import bitvla._native as native

    isa, threads = native.isa(), native.num_threads()
    yield
    native.set_isa(isa)
    native.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """PyTorch computes with one thread, whatever the environment says: the order of its sums is then one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
