"""Questions about images in the layouts of four benchmarks: what is asked, what counts as an answer, what is kept.

pytest tests/test_vqa.py
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from bitvla import BitvlaError
from bitvla.cli import main
from bitvla.convert.make_checkpoint import make_checkpoint
from bitvla.convert.pack import pack
from bitvla.evaluate import vqa
from bitvla.evaluate.questions import chosen_letter, count_questions, read_questions
from bitvla.evaluate.statistics import wilson
from bitvla.evaluate.vqa import VqaResult, evaluate
from bitvla.runtime.language import Conversation

LETTERS = "Answer with the option's letter from the given choices directly"


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def image(seed: int = 0) -> dict[str, Any]:
    """As the `datasets` library stores one."""
    return {"bytes": png(seed), "path": None}


AI2D = {"question": "What eats grass?", "options": ["fox", "cow", "owl", "pike"], "answer": "1", "image": image()}
MMMU = {
    "id": "validation_Basic_Medical_Science_7",
    "question": "<image 1> shows what?",
    "options": "['a cell', 'a <image 2>', 'it\\'s ice']",
    "answer": "C",
    "question_type": "multiple-choice",
    "image_1": image(1),
    "image_2": image(2),
    "image_3": None,
}
SEED = {
    "question_id": "101", "question": "How many?", "choice_a": "One", "choice_b": "Two", "choice_c": "Three",
    "choice_d": "Four", "answer": "D", "data_type": "image", "image": [image()],
}  # fmt: skip
MMSTAR = {
    "index": 3, "question": "Which one?\nOptions: A: red, B: blue, C: green, D: none\n", "answer": "A",
    "category": "coarse perception", "l2_category": "image emotion", "image": image(),
}  # fmt: skip
ROWS = {"ai2d": AI2D, "mmmu": MMMU, "seed-bench": SEED, "mmstar": MMSTAR}
ASKED = {
    "ai2d": f"What eats grass?\nA. fox\nB. cow\nC. owl\nD. pike\n{LETTERS}.",
    "mmmu": f"<image 1> shows what?\nA. a cell\nB. a <image 2>\nC. it's ice\n\n{LETTERS}.",
    "seed-bench": f"How many?\nA. One\nB. Two\nC. Three\nD. Four\n{LETTERS}.",
    "mmstar": f"Which one?\nOptions: A: red, B: blue, C: green, D: none\n{LETTERS}",
}
ANSWERS = {"ai2d": ("ai2d", "B", 4), "mmmu": ("Basic_Medical_Science", "C", 3), "seed-bench": ("image", "D", 4),
           "mmstar": ("coarse perception", "A", 4)}  # fmt: skip


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The same as JSON Lines, with each image in a file beside it."""

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            (path.parent / name).write_bytes(value["bytes"])
            return name
        return (
            [plain(item, f"{name}-{i}") for i, item in enumerate(value)] if isinstance(value, list) and name else value
        )

    lines = []
    for number, row in enumerate(rows):
        images = {key: plain(value, f"{number}-{key}.png") for key, value in row.items() if key.startswith("image")}
        lines.append(json.dumps(row | images))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_line_ends_at_a_newline_alone(tmp_path: Path) -> None:
    """Not at the separators of Unicode that a sentence may hold."""
    path = write_lines(tmp_path / "rows.jsonl", [SEED])
    path.write_text(path.read_text(encoding="utf-8").replace("How many?", "How\u2028many?"), encoding="utf-8")
    assert count_questions([path]) == 1
    (question,) = read_questions([path])[1]
    assert question is not None
    assert question.text.startswith("How\u2028many?")


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("write", [write_parquet, write_lines])
def test_layouts_are_read(tmp_path: Path, layout: str, write: Any) -> None:
    path = write(tmp_path / ("questions" + (".parquet" if write is write_parquet else ".jsonl")), [ROWS[layout]] * 3)
    name, questions = read_questions([path])
    assert name == layout
    assert count_questions([path, path]) == 6
    for question in questions:
        assert question is not None
        assert question.text == ASKED[layout]
        assert (question.category, question.answer, question.choices) == ANSWERS[layout]
        expected = [png(1), png(2)] if layout == "mmmu" else [png()]
        assert [part if isinstance(part, bytes) else part.read_bytes() for part in question.images] == expected


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), (" b.", "B"), ("(C)", "C"), ("D. pike", "D"), ("The answer is A.", "A"), ("Answer: B", "B"),
        ("option C", "C"), ("A fox", "A"), ("E", None), ("Blue", None), ("", None), ("I'd say B", None), ("42", None),
    ],
)  # fmt: skip
def test_a_letter_counts_where_an_answer_begins_with_it(text: str, letter: str | None) -> None:
    assert chosen_letter(text, 4) == letter


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder / "checkpoint", kind="vision-language", reduced=True)
    pack(folder / "checkpoint", folder / "model.safetensors")
    return folder / "model.safetensors"


class Writes:
    """Answers instead of a model, in the order of the calls; an exception is raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: str | BaseException) -> None:
        self.asked: list[tuple[str, int]] = []
        self._answers = iter(answers)
        monkeypatch.setattr(Conversation, "say", self)

    def __call__(self, prompt: str, *, images: list[np.ndarray], max_tokens: int) -> Iterator[str]:
        self.asked.append((prompt, len(images)))
        answer = next(self._answers)
        if isinstance(answer, BaseException):
            raise answer
        return iter(answer)


def test_accuracy_with_its_interval(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = MMMU | {"question_type": "open", "options": "[]", "answer": "42", "id": "validation_Math_1"}
    path = write_parquet(tmp_path / "mmmu.parquet", [MMMU, opened, MMMU, MMMU | {"id": "validation_Art_2"}, MMMU])
    writes = Writes(monkeypatch, "C. it's ice", "A", "C", "ice")
    result = evaluate(model_file, [path], out=tmp_path / "record.json")
    assert writes.asked == [(ASKED["mmmu"], 2)] * 4
    assert (result.rules.layout, result.rules.limit, result.rules.max_tokens) == ("mmmu", None, 16)
    assert result.total == wilson(2, 4)
    assert result.categories == {"Basic_Medical_Science": wilson(1, 3), "Art": wilson(1, 1)}
    assert (result.skipped, result.without_letter, result.errors) == (1, 1, 0)
    assert [answer.number for answer in result.answers] == [0, 2, 3, 4]
    assert vqa.msgspec.json.decode((tmp_path / "record.json").read_bytes(), type=VqaResult) == result
    assert [entry.name for entry in tmp_path.iterdir() if "partial" in entry.name] == []


def test_two_models_are_compared_question_by_question(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "seed.jsonl", [SEED] * 4)
    records = [tmp_path / f"{name}.json" for name in "abc"]
    for record, answers, limit in zip(records, ("DDAA", "DADA", "DD"), (None, None, 2), strict=True):
        Writes(monkeypatch, *answers)
        evaluate(model_file, [path], out=record, limit=limit)
    assert main(["compare", "--json", *map(str, records[:2])]) == 0
    total = json.loads(capsys.readouterr().out)["total"]
    assert (total["only_a"], total["only_b"]) == (1, 1)
    assert main(["compare", *map(str, records[::2])]) == 1
    assert "cannot compare: the rules differ in limit (None and 2)" in capsys.readouterr().err
    for record in records:
        evaluate(
            model_file,
            [write_parquet(tmp_path / "open.parquet", [MMMU | {"question_type": "open", "options": "[]"}])],
            out=record,
        )
    assert main(["compare", *map(str, records[:2])]) == 1
    assert "cannot compare: no question was asked in these records" in capsys.readouterr().err


def test_an_interrupted_evaluation_goes_on(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write_parquet(tmp_path / "ai2d.parquet", [AI2D] * 4), tmp_path / "record.json"
    Writes(monkeypatch, "B", "A", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        evaluate(model_file, [path], out=out)
    assert not out.exists()
    with pytest.raises(BitvlaError, match="unfinished evaluation with another limit"):
        evaluate(model_file, [path], out=out, limit=3)
    writes = Writes(monkeypatch, "B", "B")
    result = evaluate(model_file, [path], out=out)
    assert len(writes.asked) == 2
    assert result.total == wilson(3, 4)


def test_files_in_another_order_are_other_questions(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write_parquet(tmp_path / f"{n}.parquet", [AI2D | {"answer": n}] * 2) for n in "12"]
    records = [tmp_path / f"{name}.json" for name in "ab"]
    for record, order in zip(records, (files, files[::-1]), strict=True):
        Writes(monkeypatch, "B", "B", "C", "C")
        evaluate(model_file, order, out=record)
    assert main(["compare", *map(str, records)]) == 1
    assert "differ in files" in capsys.readouterr().err
    Writes(monkeypatch, "B", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        evaluate(model_file, files, out=records[0])
    with pytest.raises(BitvlaError, match="unfinished evaluation with another files"):
        evaluate(model_file, files[::-1], out=records[0])
    with pytest.raises(BitvlaError, match="the same questions; leave one out"):
        evaluate(model_file, [files[0]] * 2)


def test_questions_that_cannot_be_asked_are_wrong(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = AI2D | {"image": {"bytes": b"no image", "path": None}}
    path = write_parquet(tmp_path / "ai2d.parquet", [broken, AI2D])
    Writes(monkeypatch, "B")
    result = evaluate(model_file, [path], out=tmp_path / "record.json")
    assert (result.total, result.errors) == (wilson(1, 2), 1)
    assert result.answers[0].error.startswith("an image of question 0 cannot be read as an image")
    writes = Writes(monkeypatch)
    assert evaluate(model_file, [path], out=tmp_path / "record.json").total == wilson(1, 2)
    assert writes.asked == []  # what was answered is not asked again
    path = write_parquet(tmp_path / "all.parquet", [broken] * 9)
    for limit, some in ((None, 5), (2, 2)):
        with pytest.raises(BitvlaError, match=f"none of the first {some} questions could be asked: an image"):
            evaluate(model_file, [path], limit=limit)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "Why?"},
            "not questions of one known layout .ai2d, mmmu, seed-bench, mmstar.; .* fields question",
        ),
        (AI2D | {"answer": "7"}, "question 1 is not as its layout asks"),
        (AI2D | {"options": None}, "question 1 is not as its layout asks"),
        (SEED | {"answer": "E"}, "the answer is 'E', there are 4 choices"),
        (MMMU | {"options": "[broken"}, "question 1 is not as its layout asks"),
    ],
)
def test_other_questions_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_parquet(tmp_path / "questions.parquet", [row])
    with pytest.raises(BitvlaError, match=message):
        list(read_questions([path])[1])


def test_files_that_are_no_questions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("no JSON\n")
    (tmp_path / "table.parquet").write_text("no table")
    for name, message in {
        "text.jsonl": "not JSON Lines",
        "table.parquet": "as Parquet",
        "gone": "No such file",
    }.items():
        with pytest.raises(BitvlaError, match=message):
            read_questions([tmp_path / name])


def test_the_command_asks_the_model(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write_lines(tmp_path / "seed.jsonl", [SEED] * 3), tmp_path / "record.json"
    command = ["vqa", str(model_file), str(path), "--limit", "2", "--max-tokens", "2", "--json", str(out)]
    assert main(command) == 0
    assert "answers without a letter: 2" in capsys.readouterr().out  # random weights write no letters
    record = json.loads(out.read_text())
    assert (record["total"]["total"], record["rules"]["limit"], len(record["answers"])) == (2, 2, 2)
    assert record["answers"][0]["written"] == record["answers"][1]["written"] != ""


def test_a_model_without_a_tower_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", kind="language", reduced=True)
    pack(tmp_path / "checkpoint", tmp_path / "model.safetensors")
    with pytest.raises(BitvlaError, match="no vision tower"):
        evaluate(tmp_path / "model.safetensors", [write_parquet(tmp_path / "q.parquet", [AI2D])])
