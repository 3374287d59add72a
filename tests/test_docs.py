"""What the documents say is true: their paths exist, their commands parse, their Python runs."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bitvla.bundle import read
from bitvla.cli import build_parser
from bitvla.config import PolicyConfig
from bitvla.convert.make_checkpoint import make_checkpoint
from bitvla.convert.pack import pack
from bitvla.serve.guard import Guard, load_limits
from bitvla.train.config import load
from checkpoints import observation, pack_random, tiny_config

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *ROOT.glob("benchmarks/*.md"),
    *sorted(ROOT.glob("src/bitvla/policies/*.md")),
]
EVERY_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
REPOSITORY_PATH = re.compile(r"^(\.ci|benchmarks|configs|csrc|docs|examples|scripts|src|tests)/[\w./-]*$")


def blocks(document: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(document.read_text()) if name == language]


def inline(document: Path) -> list[str]:
    return INLINE.findall(FENCE.sub("", document.read_text()))


def command_lines(document: Path) -> Iterator[str]:
    for block in blocks(document, ""):
        yield from block.replace("\\\n", " ").splitlines()
    yield from inline(document)


@EVERY_DOCUMENT
def test_links_lead_somewhere(document: Path) -> None:
    assert not dead_links(document)


def dead_links(document: Path) -> list[str]:
    """Links of `document` to files that do not exist, or to headings that their file does not have."""
    dead = []
    for target in LINK.findall(FENCE.sub("", document.read_text())):
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if not target.startswith("https://") and not (path.exists() and (not anchor or anchor in anchors(path))):
            dead.append(target)
    return dead


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings of `document`."""
    headings = HEADING.findall(FENCE.sub("", document.read_text()))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Success: MT10\n```\n# no heading\n```\n")
    links = ("other.md", "other.md#success-mt10", "#here", "other.md#no-heading", "#there", "missing.md")
    document = tmp_path / "document.md"
    document.write_text("## Here\n" + " ".join(f"[link]({link})" for link in links))
    assert dead_links(document) == ["other.md#no-heading", "#there", "missing.md"]


@EVERY_DOCUMENT
def test_paths_exist(document: Path) -> None:
    words = [word for line in command_lines(document) for word in line.split()]
    for word in filter(REPOSITORY_PATH.match, words):
        assert (ROOT / word).exists(), f"{document.name} names {word}, which does not exist"


@EVERY_DOCUMENT
def test_bitvla_commands_parse(document: Path) -> None:
    for line in command_lines(document):
        words = shlex.split(line, comments=True) if line.startswith("bitvla ") else []
        # Prose may name a command without its arguments.
        if len(words) == 2 and not words[1].startswith("-"):
            words.append("--help")
        if words:
            assert parses(words[1:]), f"{document.name}: {line}"


def parses(words: list[str]) -> bool:
    try:
        build_parser().parse_args(words)
    except SystemExit as stop:
        return stop.code == 0
    return True


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.toml")), ids=lambda path: path.stem)
def test_configurations_are_read_and_say_their_command(path: Path) -> None:
    load(path)
    comment = path.read_text().replace("\\\n#", "")
    commands = re.findall(rf"^#\s+bitvla (train \w+ --config configs/{path.name} .*)$", comment, re.MULTILINE)
    assert commands, f"{path.name} does not say how it is used"
    assert all(parses(shlex.split(command)) for command in commands)


@pytest.mark.parametrize("card", sorted(ROOT.glob("src/bitvla/policies/*.md")), ids=lambda path: path.stem)
def test_cards_count_the_frames_that_their_files_were_trained_on(card: Path) -> None:
    trained = read(card.with_suffix(".safetensors")).document.provenance["data"]
    (data,) = trained if isinstance(trained, list) else [trained]
    assert re.findall(r"([\d,]+)\s+demonstrations\s+\(([\d,]+)\s+frames\)", card.read_text()) == [
        (f"{data['episodes']:,}", f"{data['frames']:,}")
    ]


def test_the_limits_of_a_robot_are_a_file_that_the_guard_takes(tmp_path: Path) -> None:
    (shown,) = [block for block in blocks(ROOT / "docs/robot.md", "") if block.startswith("# limits.toml")]
    (tmp_path / "limits.toml").write_text(shown)
    limits = load_limits(tmp_path / "limits.toml")
    guard = Guard(limits, 30.0, [axis.name for axis in limits.axes])
    guard.observe({"images": {}, "state": np.zeros(1, np.float32)})
    assert guard(np.full(1, 80, np.float32)) == pytest.approx(60 / 30), "a joint goes no faster than max_speed"


def test_commands_with_a_mistake_do_not_parse() -> None:
    assert not parses(["pack", "runs/student"])
    assert not parses(["inspect", "policy.safetensors", "--jsn"])
    assert not parses(["unpack", "--help"])


@EVERY_DOCUMENT
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in command_lines(document):
        if re.match(r"make [a-z]+", line):
            assert line.split()[1] in targets, f"{document.name}: {line}"


@EVERY_DOCUMENT
def test_extras_exist(document: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in command_lines(document):
        for names in re.findall(r"pip install .*\[([\w,]+)\]", line):
            assert set(names.split(",")) <= set(extras), f"{document.name}: {line}"


@pytest.fixture
def policy_file(document: Path, tmp_path: Path) -> Path:
    """The `policy.safetensors` of a document, random and small; one tells of the published checkpoints."""
    if document.name != "full-size.md":
        # A chunk so long that the executor does not run out of it on a machine that is busy with other tests.
        return pack_random(tmp_path, tiny_config(action=msgspec.structs.replace(tiny_config().action, horizon=40)))
    make_checkpoint(tmp_path / "checkpoint", reduced=True)
    pack(tmp_path / "checkpoint", tmp_path / "policy.safetensors")
    return tmp_path / "policy.safetensors"


class Robot:
    """What a snippet may call `robot`: it takes finite action vectors of the policy's size."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self.actions: list[Any] = []

    def step(self, action: Any) -> None:
        assert action.shape == (self.config.action.dim,)
        assert np.isfinite(action).all()
        self.actions.append(action)


def test_there_is_python_to_run() -> None:
    assert blocks(ROOT / "README.md", "python")


@EVERY_DOCUMENT
def test_python_snippets_run(document: Path, policy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(policy_file.parent)
    config = read(policy_file).config
    seen = observation(config)
    for snippet in blocks(document, "python"):
        robot = Robot(config)
        images = {f"{camera}_image": image for camera, image in seen["images"].items()}
        names = images | {"state": seen["state"], "robot": robot}
        exec(compile(snippet, f"{document.name} snippet", "exec"), names)
        if "robot" in snippet:
            assert robot.actions
