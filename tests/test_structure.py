"""The shape of the project: who may import whom, what the README draws, what must not be in a committed file.

That a policy runs where PyTorch is missing is in test_light.py.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "bitvla"

# Nothing in the first may import, at any depth of a file, anything in the second.
FORBIDDEN = {
    "runtime": ("torch", "transformers", "bitvla.model", "bitvla.train", "bitvla.sim", "bitvla.evaluate"),
    "processing": ("torch", "transformers", "bitvla.model", "bitvla.train", "bitvla.runtime", "bitvla.sim"),
    "bundle.py": ("torch", "transformers", "bitvla.model", "bitvla.train", "bitvla.sim"),
    "serve": (
        "torch", "transformers", "pickle", "bitvla.model", "bitvla.train", "bitvla.sim", "bitvla.evaluate",
        "bitvla.runtime", "bitvla.bundle",
    ),
    "serve/client.py": ("bitvla.config", "bitvla.processing", "bitvla.serve.core", "bitvla.load"),
    "robot": ("torch", "transformers", "bitvla.model", "bitvla.train"),
    "quantization.py": ("torch", "bitvla"),
    "model": ("bitvla.sim", "bitvla.serve", "bitvla.evaluate", "metaworld", "mujoco"),
    "train": ("bitvla.sim", "bitvla.serve", "bitvla.evaluate", "metaworld", "mujoco"),
    "train/starts.py": ("bitvla.train.policy", "bitvla.train.language", "bitvla.train.loop", "bitvla.train.plan"),
    "train/policy.py": ("bitvla.train.language", "bitvla.train.loop", "bitvla.train.plan"),
    "train/language.py": ("bitvla.train.policy", "bitvla.train.loop", "bitvla.train.plan"),
    "data": ("bitvla.model", "bitvla.train", "bitvla.evaluate"),
    "sim": ("torch", "bitvla.model", "bitvla.train", "bitvla.runtime", "bitvla.evaluate", "bitvla.robot"),
    "evaluate": ("torch", "bitvla.train", "bitvla.robot", "metaworld", "mujoco"),
}  # fmt: skip
# What loads a policy, and what asks a language model; the rest of evaluate/ is handed one.
LOADERS = {"policy_host.py", "vqa.py"}
POLICIES = ("bitvla.model", "bitvla.bundle", "bitvla.runtime.policy", "bitvla.runtime.language", "bitvla.load")
FORBIDDEN |= {
    f"evaluate/{path.name}": POLICIES for path in (PACKAGE / "evaluate").glob("*.py") if path.name not in LOADERS
}


def imported(source: str) -> Iterator[str]:
    """Every module that a source imports, also inside functions; `from a import b` counts as a and as a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def python_files(part: str) -> list[Path]:
    path = PACKAGE / part
    return [path] if path.suffix else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_go_one_way(part: str) -> None:
    files = python_files(part)
    assert files, f"{part} does not exist"
    for file in files:
        for module in imported(file.read_text()):
            for forbidden in FORBIDDEN[part]:
                inside = module == forbidden or module.startswith(forbidden + ".")
                assert not inside, f"{file.relative_to(ROOT)} imports {module}"


def test_the_import_finder_sees_every_form() -> None:
    source = "import torch.nn\ndef f():\n    from bitvla import sim\n    from bitvla.model import network as n\n"
    assert set(imported(source)) >= {"torch.nn", "bitvla.sim", "bitvla.model", "bitvla.model.network"}


def test_the_command_line_imports_the_rest_when_a_command_runs() -> None:
    tree = ast.parse((PACKAGE / "cli.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {module for module in imported(ast.unparse(tree)) if module.split(".")[0] not in sys.stdlib_module_names}
    assert {".".join(module.split(".")[:2]) for module in modules} == {
        "bitvla", "bitvla.__version__", "bitvla.errors", "bitvla.robot",
    }  # fmt: skip


def test_the_readme_draws_the_tree_that_is_there() -> None:
    drawn = set(re.findall(r"^  ([\w.]+?)/? {2,}\S", tree_of_readme(), re.MULTILINE))
    there = {path.name for path in PACKAGE.iterdir() if is_a_room(path)}
    assert drawn == there


def test_the_readme_draws_top_folders_that_are_there() -> None:
    for folder in re.findall(r"^([\w.]+(?:/\w+)*)/", tree_of_readme(), re.MULTILINE):
        assert (ROOT / folder).is_dir(), f"README draws {folder}/, which does not exist"


def tree_of_readme() -> str:
    match = re.search(r"^```\n(src/bitvla/\n.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert match, "README has no tree"
    return match[1]


def is_a_room(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob("*")) and not path.name.startswith(("_", "."))
    return path.suffix == ".py" and not path.name.startswith("_")


# Written in pieces, so that this file does not hold what it looks for.
MACHINE_FOLDERS = ("home", "Users", "root", "work", "var/tmp", "mnt")
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:" + "|".join(MACHINE_FOLDERS) + r")/\w")
TEXT = {
    "",
    ".cff",
    ".cmake",
    ".cpp",
    ".css",
    ".h",
    ".html",
    ".j2",
    ".js",
    ".json",
    ".md",
    ".py",
    ".sh",
    ".toml",
    ".txt",
}


def committed_files() -> Iterator[Path]:
    """Every text file that .gitignore does not exclude; git itself need not be installed."""
    ignored = {".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text().split())}
    folders = [ROOT]
    while folders:
        for path in folders.pop().iterdir():
            if path.name in ignored or path.name.endswith(".egg-info"):
                continue
            if path.is_dir():
                folders.append(path)
            elif path.suffix in TEXT:
                yield path


def test_no_path_of_a_machine_is_committed() -> None:
    files = list(committed_files())
    assert ROOT / "Makefile" in files
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            found = MACHINE_PATH.search(line)
            assert not found, f"{file.relative_to(ROOT)}:{number} names a folder of one machine: {line.strip()}"


def test_the_path_finder_finds() -> None:
    assert MACHINE_PATH.search("see /" + "home/someone/data")
    assert not MACHINE_PATH.search("https://example.org/" + "home/page")
