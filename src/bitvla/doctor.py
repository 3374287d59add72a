"""What this machine has for bitvla, and how to get what is missing. Nothing here needs more than the core package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from typing import Any

import bitvla
from bitvla.errors import BitvlaError

EXTRAS = {
    "sim": ("metaworld", "mujoco", "gymnasium", "OpenGL", "packaging"),
    "train": ("torch", "transformers", "accelerate"),
    "data": ("pandas", "pyarrow", "av", "fsspec", "upath", "h5py", "google_crc32c"),
    "serve": ("websockets", "msgpack", "prometheus_client", "grpc", "google.protobuf", "zmq"),
    "report": ("scipy", "matplotlib", "jinja2"),
    "ray": ("ray",),
}
"""Which packages each extra of `pip install bitvla[...]` brings, by the name that is imported."""

# Renders one pixel; EGL and OSMesa are loaded by MuJoCo as MUJOCO_GL says, and fail in ways only a process survives.
_RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
with mujoco.Renderer(model, 8, 8) as renderer:
    renderer.update_scene(mujoco.MjData(model))
    print(renderer.render().shape)
"""
_PROCESS_SECONDS = 60
_LIBRARIES = {"egl": "libegl1", "osmesa": "libosmesa6"}


def doctor() -> dict[str, Any]:
    """{"passed", "checks": [{"check", "state", "detail", "fix"}]}; a state is "ok", "missing" or "broken".

    `passed` says whether a policy can run; simulators, rendering and extras may well be missing on a robot.
    """
    native = _native()
    checks = [_python(), native, *(_kernels() if native["state"] == "ok" else [])]
    checks += [_extra(extra, packages) for extra, packages in EXTRAS.items()]
    if _installed("mujoco"):
        checks.append(_rendering())
    checks.append(_libero())
    return {"passed": native["state"] == "ok", "checks": checks}


def _check(name: str, state: str, detail: str, fix: str = "") -> dict[str, Any]:
    return {"check": name, "state": state, "detail": detail, "fix": fix}


def _python() -> dict[str, Any]:
    detail = (
        f"bitvla {bitvla.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    return _check("system", "ok", detail)


def _native() -> dict[str, Any]:
    reinstall = "pip install --force-reinstall bitvla (in the repository: make setup)"
    if not _installed("bitvla._native"):
        return _check("native kernels", "missing", "not built", reinstall)
    try:
        import bitvla._native as native
    except ImportError as error:  # also where BITVLA_ISA asks for what this processor lacks
        fix = "unset BITVLA_ISA" if os.environ.get("BITVLA_ISA") else reinstall
        return _check("native kernels", "broken", " ".join(str(error).split()), fix)
    return _check("native kernels", "ok", f"uses {native.isa()}; has {', '.join(native.available())}")


def _kernels() -> list[dict[str, Any]]:
    import bitvla._native as native
    from bitvla.runtime.machine import cores, processor

    threads = f"{native.num_threads()} on {cores()} cores"
    peak = native.peak_int8_gmacs(0.1, 1)
    return [
        _check("processor", "ok", processor()),
        _check("threads", "ok", threads),
        _check("int8 ceiling", "ok", f"{peak:.0f} GMAC/s on one thread"),
    ]


def _extra(extra: str, packages: tuple[str, ...]) -> dict[str, Any]:
    missing = [package for package in packages if not _installed(package)]
    if missing:
        return _check(f"extra {extra}", "missing", f"lacks {', '.join(missing)}", f"pip install 'bitvla[{extra}]'")
    return _check(f"extra {extra}", "ok", ", ".join(f"{package} {_version(package)}".strip() for package in packages))


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package
        return False


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _libero() -> dict[str, Any]:
    """Whether the environment that LIBERO lives in is there, and answers."""
    from bitvla.sim.libero import PACKAGE, find_python

    try:
        python = find_python()
    except BitvlaError:
        return _check("simulator libero", "missing", "not installed", "make libero")
    question = f"from importlib.metadata import version; print(version('{PACKAGE}'))"
    try:
        done = subprocess.run(
            [python, "-I", "-c", question], capture_output=True, text=True, timeout=_PROCESS_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or error
        return _check("simulator libero", "broken", f"{python} does not run: {reason}", "make libero")
    if done.returncode:
        return _check("simulator libero", "broken", f"{python} has no {PACKAGE}", "make libero")
    return _check("simulator libero", "ok", f"{PACKAGE} {done.stdout.strip()}")


def _rendering() -> dict[str, Any]:
    """Try to render, in a process of its own, as MUJOCO_GL says or with EGL where it says nothing."""
    backend = os.environ.get("MUJOCO_GL", "egl")
    name = f"rendering (MUJOCO_GL={backend})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RENDER],
            env=os.environ | {"MUJOCO_GL": backend},
            capture_output=True,
            text=True,
            timeout=_PROCESS_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _check(name, "broken", f"no image after {_PROCESS_SECONDS} s", "MUJOCO_GL=osmesa bitvla doctor")
    if done.returncode == 0:
        return _check(name, "ok", "renders without a display")
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    library = _LIBRARIES.get(backend)
    fix = f"sudo apt-get install {library} libgl1-mesa-dri" if library else "export MUJOCO_GL=egl"
    return _check(name, "broken", reason, fix)
