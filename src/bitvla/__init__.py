"""1-bit vision-language-action policies that run on any CPU. `import bitvla` is light and never imports PyTorch.

policy = bitvla.load("policy.safetensors")
chunk = policy.act({"images": {"corner": image}, "state": state, "instruction": "open the drawer"})
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from bitvla.errors import BitvlaError

if TYPE_CHECKING:
    from bitvla.runtime.policy import Policy
    from bitvla.serve.client import RemotePolicy

__version__ = "0.1.0"
__all__ = ["BitvlaError", "connect", "load"]

POLICY_FILE = "policy.safetensors"  # its name in a Hugging Face repository

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # "org/name"


def load(source: str | os.PathLike[str], threads: int | None = None, prune: float = 0.0) -> Policy:
    """Load a policy from a file, or from the Hugging Face Hub by its id ("org/name").

    `threads` sets how many threads the kernels of this process use (default: one for each core it may use). `prune`,
    from 0 to below 1, is the share of each image's tokens, those that resemble others most, that the decoder does
    without: faster, and other actions (docs/results.md). Raises BitvlaError for a file that is missing, damaged or not
    a policy.
    """
    from bitvla.runtime.policy import Policy

    return Policy.load(_local(os.fspath(source)), threads, prune)


def connect(url: str, token: str | None = None, timeout: float = 5.0) -> RemotePolicy:
    """Use a policy that `bitvla serve` serves at `url` ("ws://host:8000"), with the same `act`, `reset` and `info`.

    No call takes much longer than `timeout` seconds. Raises BitvlaError when nobody answers there in that time, or
    another protocol, or `token` is wrong. Needs `pip install 'bitvla[serve]'`, and no policy file.
    """
    from bitvla.serve.client import RemotePolicy

    return RemotePolicy(url, token, timeout)


def _local(source: str) -> Path:
    path = Path(source)
    if path.exists() or path.suffix == ".safetensors" or not HUB_ID.fullmatch(source):
        return path
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise BitvlaError(
            f"{source} is not a file here; to fetch a policy from the Hugging Face Hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(hf_hub_download(source, POLICY_FILE))
    except Exception as error:  # the hub's errors have no common base that promises a readable text
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BitvlaError(f"{source} is neither a file here nor a policy on the Hugging Face Hub ({reason})") from None
