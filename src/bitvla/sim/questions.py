"""Questions about a simulator's scenes, whose answers it knows: `make_questions(...)` writes images and conversations.

Coloured toys lie on the table of Meta-World's tasks, at which the expert works. For training there are captions and
instructions in LLaVA's JSON layout; of other seeds a test, in the layout of MMStar, which `bitvla vqa` asks.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bitvla.data.lerobot import alone
from bitvla.errors import BitvlaError
from bitvla.files import write_whole
from bitvla.processing.prompt import ASK_FOR_A_LETTER
from bitvla.sim.base import TRAINING_SEEDS
from bitvla.sim.metaworld import SWAP_GROUPS, TOYS, MetaWorld, Toy

GROUPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "drawer": SWAP_GROUPS[:1],
    "window": SWAP_GROUPS[1:2],
    "puck": SWAP_GROUPS[2:],
    "button": (("button-press-topdown-v3",),),
    "peg": (("peg-insert-side-v3",),),
}
"""What stands on the table, and the groups of tasks that share such a scene."""
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.1), "blue": (0.1, 0.2, 0.9), "yellow": (0.95, 0.85, 0.1)}
MOST_TOYS = 4
PICTURES = 6  # of an episode, each with other toys
STEPS = 30  # between two pictures, at most
TURNS = 4  # questions about a picture
APART = 0.1  # of the picture's width; closer things are not compared
CAPTION_PROMPTS = ("Describe the picture.", "What is in the picture?", "What do you see?")


class Question(NamedTuple):
    """A question with one right answer among up to four options, in the order in which they are listed."""

    category: str
    text: str
    answer: str
    options: Sequence[str]

    def listed(self) -> str:
        """The question with its options, as MMStar writes it."""
        options = ", ".join(f"{letter}: {option}" for letter, option in zip("ABCD", self.options, strict=False))
        return f"{self.text}\nOptions: {options}"

    def letter(self) -> str:
        return "ABCD"[list(self.options).index(self.answer)]


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `toys` are colours, shapes and places from left (0) to right (1), in that order.

    `across` is the place of the `thing` that stands beside the robot. What cannot be told for sure is None.
    """

    thing: str
    across: float | None
    toys: tuple[tuple[str, str, float], ...]
    doing: str | None
    gripper: str | None
    opening: str | None
    marker: str | None


@dataclass(frozen=True)
class Settings:
    """What a folder of questions is made from."""

    images: int
    test_images: int
    seed: int
    image_size: int


def make_questions(
    out: Path,
    images: int,
    test_images: int,
    *,
    seed: int = 0,
    image_size: int = 128,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Write `images` pictures to train on and `test_images` to test with into the folder `out`, or go on doing so.

    It then holds images/, captions.json, instructions.json and test.jsonl; scenes.jsonl is what they are written from.
    Raises BitvlaError for a folder with other settings, or in which another process is at it, and for a full disk.
    """
    out, journal = Path(out), Path(out) / "scenes.jsonl"
    jobs = [
        (split, number, min(PICTURES, count - number))
        for split, count in (("train", images), ("test", test_images))
        for number in range(0, count, PICTURES)
    ]
    with alone(out, "`bitvla questions`"), MetaWorld(image_size) as simulator:
        made = _made_so_far(journal, Settings(images, test_images, seed, image_size))
        for done, (split, first, count) in enumerate(jobs):
            if done >= len(made):
                made.append(_episode(simulator, out, split, first, count, seed))
                _append(journal, made[-1])
            if progress:
                progress(done + 1, len(jobs), "")
    rows = {name: [row for episode in made for row in episode if row["split"] == name] for name in ("train", "test")}
    captions = [_entry(row, [row["caption"]]) for row in rows["train"]]
    instructions = [_entry(row, row["turns"]) for row in rows["train"]]
    test = [{**asked, "image": row["image"]} for row in rows["test"] for asked in row["questions"]]
    write_whole(out / "captions.json", _json(captions))
    write_whole(out / "instructions.json", _json(instructions))
    write_whole(out / "test.jsonl", *(json.dumps(row).encode() + b"\n" for row in test))
    return {"out": str(out), "images": images, "test images": test_images, "test questions": len(test)}


def _entry(row: dict[str, Any], turns: Iterable[Sequence[str]]) -> dict[str, Any]:
    """As LLaVA writes it: the picture comes with the first question."""
    said = [text for question, answer in turns for text in (question, answer)]
    said[0] = f"<image>\n{said[0]}"
    messages = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(said)]
    return {"id": Path(row["image"]).stem, "image": row["image"], "conversations": messages}


# -- one episode -------------------------------------------------------------------------------


def _episode(simulator: MetaWorld, out: Path, split: str, first: int, count: int, seed: int) -> list[dict[str, Any]]:
    """Write the pictures of an episode and return what is asked about them: a pure function of the arguments."""
    rng = np.random.default_rng([seed, split == "test", first])
    thing = str(rng.choice(list(GROUPS)))
    group = GROUPS[thing][rng.integers(len(GROUPS[thing]))]
    task = group[rng.integers(len(group))]
    start = int(rng.integers(TRAINING_SEEDS)) + (0 if split == "test" else TRAINING_SEEDS)
    simulator.reset(task, start, ambiguous=group if len(group) > 1 else False)
    act, rows = simulator.expert(), []
    for number in range(first, first + count):
        for _ in range(rng.integers(STEPS)):
            simulator.step(act())
        placed = _place_toys(simulator, rng)
        scene = _scene(simulator, thing, placed)
        image = f"images/{split}-{number:06d}.png"
        buffer = io.BytesIO()
        Image.fromarray(simulator.picture("corner")).save(buffer, "PNG")
        write_whole(out / image, buffer.getvalue())
        chosen = questions(scene, rng)
        chosen = [chosen[i] for i in rng.permutation(len(chosen))[:TURNS]]
        rows.append({"split": split, "image": image, "scene": asdict(scene)} | _asked(scene, chosen, split, rng))
    return rows


def _place_toys(simulator: MetaWorld, rng: np.random.Generator) -> list[tuple[str, str, float]]:
    """Put toys where the picture shows them whole; their colours, shapes and places from left to right."""
    kinds = [(colour, shape) for colour in COLOURS for shape in TOYS]
    hand, thing = simulator.keypoints()[0, :2]
    toys: list[Toy] = []
    seen: list[tuple[str, str, tuple[float, float]]] = []
    for index in rng.permutation(len(kinds))[: rng.integers(1, MOST_TOYS + 1)]:
        colour, shape = kinds[index]
        for _ in range(20):
            toy = Toy(shape, COLOURS[colour], (float(rng.uniform(-0.3, 0.35)), float(rng.uniform(0.4, 0.68))))
            u, v = simulator.points(np.array([[*toy.place, 0.02]]))[0]
            behind_the_arm = abs(u - hand[0]) < 1.3 * APART and v < hand[1] + APART
            others = [thing, *(point for *_, point in seen)]
            clear = all(max(abs(u - x), abs(v - y) * 0.7) > APART for x, y in others)
            if 0.06 < u < 0.94 and 0.1 < v < 0.94 and clear and not behind_the_arm:
                toys.append(toy)
                seen.append((colour, shape, (u, v)))
                break
    simulator.toys = tuple(toys)
    return sorted(((colour, shape, float(point[0])) for colour, shape, point in seen), key=lambda toy: toy[2])


def _scene(simulator: MetaWorld, thing: str, toys: list[tuple[str, str, float]]) -> Scene:
    """What the simulator knows; margins keep out what a person could not tell either."""
    (seen_hand, place, _, goal), opening = simulator.keypoints()[0], simulator.outcome()["opening"]
    hand, held = simulator.state()[:3], simulator.environment_state()[:3]
    hidden = np.abs(seen_hand - goal).max() < APART
    distance, gripper = float(np.linalg.norm(hand - held)), simulator.gripper_opening()
    doing = "moving freely" if distance > 0.15 else f"touching the {thing}" if distance < 0.07 else None
    if thing in ("puck", "peg") and held[2] > 0.08:
        doing = f"lifting the {thing}" if distance < 0.1 else None
    return Scene(
        thing=thing,
        across=float(place[0]) if 0 <= place[0] < 1 else None,
        toys=tuple(toys),
        doing=doing,
        gripper=_either(gripper, 0.45, "closed", 0.75, "open"),
        opening=None if opening is None else _either(opening, 0.04, "closed", 0.13, "open"),
        marker=simulator.marker_colour() if thing == "puck" and not hidden else None,
    )


def _either(value: float, low: float, below: str, high: float, above: str) -> str | None:
    return below if value < low else above if value > high else None


# -- what is asked -----------------------------------------------------------------------------


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Everything that the scene answers without doubt."""
    others = [thing for thing in GROUPS if thing != scene.thing]
    things = sorted([scene.thing, *map(str, rng.permutation(others)[:3])])
    asked = [Question("object", "What stands on the table with the toys?", scene.thing, things)]
    if scene.doing:
        doings = ("moving freely", f"touching the {scene.thing}", f"lifting the {scene.thing}")
        asked.append(Question("robot", "What is the robot doing?", scene.doing, doings))
    for what, state in (("gripper", scene.gripper), (scene.thing, scene.opening)):
        if state:
            asked.append(Question("state", f"Is the {what} open or closed?", state, ("open", "closed")))
    if scene.marker:
        asked.append(Question("colour", "What colour is the marker?", scene.marker, tuple(COLOURS)))
    return asked + (_about_toys(scene, rng) if scene.toys else [])


def _about_toys(scene: Scene, rng: np.random.Generator) -> list[Question]:
    toys, names = scene.toys, [f"{colour} {shape}" for colour, shape, _ in scene.toys]
    colours, shapes = [colour for colour, _, _ in toys], [shape for _, shape, _ in toys]
    asked = [Question("counting", "How many toys are on the table?", str(len(toys)), "1234")]
    counted = str(rng.choice(list(TOYS)))
    if (count := shapes.count(counted)) < 4:
        asked.append(Question("counting", f"How many {counted}s are on the table?", str(count), "0123"))
    for colour, shape, _ in toys:
        if shapes.count(shape) == 1:
            asked.append(Question("colour", f"What colour is the {shape}?", colour, tuple(COLOURS)))
        if colours.count(colour) == 1:
            asked.append(Question("shape", f"What shape is the {colour} toy?", shape, tuple(TOYS)))
    left, right = sorted(rng.permutation(len(toys))[:2]) if len(toys) > 1 else (0, 0)
    if toys[right][2] - toys[left][2] > APART:
        pair = [names[i] for i in rng.permutation([left, right])]
        asked.append(
            Question("order", f"Which toy is further left, the {pair[0]} or the {pair[1]}?", names[left], pair)
        )
    which = rng.integers(len(toys))
    if scene.across is not None and abs(away := toys[which][2] - scene.across) > APART:
        side = "left" if away < 0 else "right"
        text = f"Is the {names[which]} left or right of the {scene.thing}?"
        asked.append(Question("order", text, side, ("left", "right")))
    return asked


def caption(scene: Scene) -> str:
    """The scene in a sentence or two."""
    thing = {"open": f"an open {scene.thing}", "closed": f"a closed {scene.thing}"}.get(
        scene.opening or "", f"a {scene.thing}"
    )
    gripper = f" with its gripper {scene.gripper}" if scene.gripper else ""
    doing = f" {scene.doing}" if scene.doing else ""
    toys = [f"a {colour} {shape}" for colour, shape, _ in scene.toys]
    row = f" From left to right: {', '.join(toys)}." if toys else ""
    noun = "toy" if len(toys) == 1 else "toys"
    marker = f" The marker is {scene.marker}." if scene.marker else ""
    return f"A robot{gripper}{doing} at a table with {thing} and {len(toys)} {noun}.{row}{marker}"


def _asked(scene: Scene, chosen: Sequence[Question], split: str, rng: np.random.Generator) -> dict[str, Any]:
    """The texts about a picture: a test has choices alone, training half of the time."""
    if split == "test":
        rows = [
            {"question": asked.listed(), "answer": asked.letter(), "category": asked.category, "l2_category": ""}
            for asked in chosen
        ]
        return {"questions": rows}
    turns = [
        (f"{asked.listed()}{ASK_FOR_A_LETTER}", asked.letter()) if rng.random() < 0.5 else (asked.text, asked.answer)
        for asked in chosen
    ]
    return {"turns": turns, "caption": (str(rng.choice(CAPTION_PROMPTS)), caption(scene))}


# -- files -------------------------------------------------------------------------------------


def _made_so_far(journal: Path, settings: Settings) -> list[list[dict[str, Any]]]:
    """The episodes in `journal`, a line each, after a line with the settings; a line that was torn is cut off."""
    if not journal.exists():
        if journal.parent.is_dir() and any(journal.parent.iterdir()):
            raise BitvlaError(f"{journal.parent} is not empty and holds no questions of bitvla; choose another folder")
        write_whole(journal, json.dumps(asdict(settings)).encode() + b"\n")
        return []
    whole, newline, torn = journal.read_bytes().rpartition(b"\n")
    if torn:
        write_whole(journal, whole + newline)
    first, *lines = whole.splitlines()
    if json.loads(first) != asdict(settings):
        raise BitvlaError(
            f"{journal.parent} holds questions with other settings ({first.decode()}); choose another folder"
        )
    return [json.loads(line) for line in lines]


def _append(journal: Path, episode: list[dict[str, Any]]) -> None:
    try:
        with journal.open("ab") as file:
            file.write(json.dumps(episode).encode() + b"\n")
    except OSError as error:
        raise BitvlaError(f"cannot write {journal}: {error.strerror}; free some space and run again") from None


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()
