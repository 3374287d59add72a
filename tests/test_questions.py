"""Questions about Meta-World's scenes: true answers, files that the others read, a run that goes on.

pytest tests/test_questions.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitvla.cli import main
from bitvla.data.lerobot import alone
from bitvla.data.llava import LlavaDataset
from bitvla.errors import BitvlaError
from bitvla.evaluate.questions import read_questions
from bitvla.processing.prompt import ASK_FOR_A_LETTER
from bitvla.sim import questions as asking
from bitvla.sim.metaworld import MetaWorld, Toy
from bitvla.sim.questions import Scene, caption, make_questions, questions

SCENE = Scene(
    thing="drawer",
    across=0.5,
    toys=(("red", "cube", 0.2), ("blue", "cube", 0.4), ("red", "disc", 0.7)),
    doing="touching the drawer",
    gripper="closed",
    opening="open",
    marker=None,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("questions") / "scenes"
    assert main(["questions", str(out), "--images", "8", "--test-images", "3", "--image-size", "32"]) == 0
    return out


def test_answers_are_those_of_the_scene() -> None:
    asked = [q for seed in range(30) for q in questions(SCENE, np.random.default_rng(seed))]
    answers = {question.text: question.answer for question in asked}
    assert answers["How many toys are on the table?"] == "3"
    assert (answers["How many cubes are on the table?"], answers["How many balls are on the table?"]) == ("2", "0")
    assert answers["What colour is the disc?"] == "red"
    assert answers["What shape is the blue toy?"] == "cube"
    assert "What colour is the cube?" not in answers  # there are two
    assert "What colour is the marker?" not in answers
    assert answers["Which toy is further left, the red disc or the blue cube?"] == "blue cube"
    assert answers["Is the red cube left or right of the drawer?"] == "left"
    assert answers["Is the red disc left or right of the drawer?"] == "right"
    assert "Is the blue cube left or right of the drawer?" not in answers  # too near to tell
    assert (answers["Is the drawer open or closed?"], answers["Is the gripper open or closed?"]) == ("open", "closed")
    for question in asked:
        assert f"{question.letter()}: {question.answer}" in question.listed()
        assert len(set(question.options)) == len(question.options) <= 4
    assert caption(SCENE) == (
        "A robot with its gripper closed touching the drawer at a table with an open drawer and 3 toys. From left to "
        "right: a red cube, a blue cube, a red disc."
    )


def test_files_are_what_training_and_evaluation_read(made: Path) -> None:
    captions, instructions = (LlavaDataset(made / f"{name}.json") for name in ("captions", "instructions"))
    assert len(captions.entries) == len(instructions.entries) == 8
    assert [len(entry.turns) for entry in captions.entries] == [1] * 8
    assert all(1 <= len(entry.turns) <= asking.TURNS for entry in instructions.entries)
    assert captions.image(captions.entries[0].images[0]).shape == (32, 32, 3)
    letters = [turn for entry in instructions.entries for turn in entry.turns if turn.prompt.endswith(ASK_FOR_A_LETTER)]
    assert all(turn.answer in "ABCD" for turn in letters)
    layout, rows = read_questions([made / "test.jsonl"])
    asked = [row for row in rows if row]
    assert layout == "mmstar"
    assert {image for row in asked for image in row.images} == {made / f"images/test-00000{n}.png" for n in range(3)}
    assert all("\nOptions: A: " in row.text and row.text.endswith(ASK_FOR_A_LETTER) for row in asked)


def test_a_run_that_was_interrupted_goes_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episode = asking._episode

    def second(simulator: MetaWorld, out: Path, split: str, first: int, *rest: Any) -> Any:
        if first:
            raise KeyboardInterrupt
        return episode(simulator, out, split, first, *rest)

    monkeypatch.setattr(asking, "_episode", second)
    with pytest.raises(KeyboardInterrupt):
        make_questions(tmp_path / "cut", 8, 3, image_size=32)
    with (tmp_path / "cut" / "scenes.jsonl").open("a") as file:
        file.write('[{"torn')
    monkeypatch.undo()
    make_questions(tmp_path / "cut", 8, 3, image_size=32)
    for path in made.rglob("*.*"):
        assert (tmp_path / "cut" / path.relative_to(made)).read_bytes() == path.read_bytes(), path
    with pytest.raises(BitvlaError, match="holds questions with other settings"):
        make_questions(made, 9, 3, image_size=32)
    with alone(made, "test"), pytest.raises(BitvlaError, match="another `bitvla questions` is writing"):
        make_questions(made, 8, 3, image_size=32)
    with pytest.raises(BitvlaError, match="holds no questions of bitvla"):
        make_questions(made / "images", 9, 3)


def test_training_and_test_scenes_differ(made: Path) -> None:
    scenes = [json.loads(line) for line in (made / "scenes.jsonl").read_text().splitlines()[1:]]
    places = {row["image"]: [toy[2] for toy in row["scene"]["toys"]] for episode in scenes for row in episode}
    assert len({tuple(place) for place in places.values()}) == len(places)


def test_toys_are_seen_where_they_are() -> None:
    with MetaWorld(64) as simulator:
        simulator.reset("drawer-open-v3", 3)
        before = simulator.picture("corner").astype(int)
        simulator.toys = (Toy("ball", (0.1, 0.2, 0.9), (0.1, 0.5)),)
        changed = np.abs(simulator.picture("corner") - before).sum(-1) > 60
        rows, columns = np.nonzero(changed)
        found = np.array([columns.mean() + 0.5, rows.mean() + 0.5]) / 64
        assert np.abs(found - simulator.points(np.array([[0.1, 0.5, 0.03]]))[0]).max() < 0.02
        simulator.reset("drawer-open-v3", 3)
        assert np.array_equal(simulator.picture("corner"), before)
