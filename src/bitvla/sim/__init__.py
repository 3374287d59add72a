"""Simulators, their scripted experts, and what is recorded and asked in them."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from bitvla.errors import BitvlaError

if TYPE_CHECKING:
    from bitvla.sim.base import Simulator


def make_simulator(name: str, **options: Any) -> Simulator:
    """Create a simulator by name (``metaworld``, ``libero``); ``options`` go to its constructor.

    Raises:
        BitvlaError: unknown name, or the simulator's packages are not installed.
    """
    if name == "libero":
        from bitvla.sim.libero import Libero

        return Libero(**options)
    if name != "metaworld":
        raise BitvlaError(f"unknown simulator '{name}': available are 'metaworld' and 'libero'")
    for package in ("metaworld", "mujoco"):
        if importlib.util.find_spec(package) is None:
            raise BitvlaError(
                f"simulator '{name}' needs the package '{package}', which is not installed: pip install 'bitvla[sim]'"
            )
    from bitvla.sim.metaworld import MetaWorld

    return MetaWorld(**options)
