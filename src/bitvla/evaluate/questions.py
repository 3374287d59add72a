"""Multiple-choice questions about images, read from local files in the layouts in which four benchmarks are published.

Files are Parquet, as on the Hugging Face Hub (lmms-lab/ai2d, MMMU/MMMU, lmms-lab/SEED-Bench, Lin-Chen/MMStar), or JSON
Lines with the same fields, where an image is a path beside the file. What is asked is what lmms-eval asks.
"""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bitvla.errors import BitvlaError
from bitvla.processing.prompt import ASK_FOR_A_LETTER

_ASK = f"{ASK_FOR_A_LETTER}."
_BATCH = 16  # rows of a Parquet file in memory, with their images


class Question(NamedTuple):
    """`images` are files, or their bytes; `answer` is the letter of one of the `choices` first ones."""

    category: str
    text: str
    images: tuple[Path | bytes, ...]
    choices: int
    answer: str


def read_questions(files: Sequence[Path]) -> tuple[str, Iterator[Question | None]]:
    """The layout of the files, and their questions one by one; None for a question that has no choices (MMMU).

    BitvlaError for a file that is missing or of no known layout, and later for a question that is not as it should be.
    """
    columns = [_columns(path) for path in files]
    layouts = {name for name, layout in LAYOUTS.items() if all(layout.fields <= there for there in columns)}
    if len(layouts) != 1:
        raise BitvlaError(
            f"{', '.join(map(str, files))}: not questions of one known layout ({', '.join(LAYOUTS)}); the first file "
            f"has the fields {', '.join(sorted(columns[0])) if columns else 'of nothing'}"
        )
    (name,) = layouts
    return name, _questions(files, LAYOUTS[name].question)


def count_questions(files: Sequence[Path]) -> int:
    """Rows in the files, without reading them where they say it themselves."""
    return sum(_parquet(path).metadata.num_rows if _is_parquet(path) else len(_lines(path)) for path in files)


def chosen_letter(text: str, choices: int) -> str | None:
    """The letter of a choice that an answer begins with, as in "B", "b", "(B)", "B. red" or "The answer is B"; else
    None."""
    if len(text.strip(string.punctuation + string.whitespace)) == 1:
        text = text.upper()
    found = re.match(r"\W*(?:(?i:the answer is|answer|option)\W+)?([A-Z])(?![A-Za-z0-9'])", text)
    return found[1] if found and found[1] in string.ascii_uppercase[:choices] else None


# The layouts.


def _ai2d(row: Mapping[str, Any], image: Callable[[Any], Path | bytes]) -> Question:
    options = list(row["options"])
    text = f"{row['question']}\n{_listed(options)}{_ASK}"
    return Question("ai2d", text, (image(row["image"]),), len(options), string.ascii_uppercase[int(row["answer"])])


def _mmmu(row: Mapping[str, Any], image: Callable[[Any], Path | bytes]) -> Question | None:
    if row["question_type"] != "multiple-choice":
        return None
    options = row["options"]
    options = ast.literal_eval(options) if isinstance(options, str) else list(options)  # a list, written as text
    text = f"{row['question']}\n{_listed(options)}\n{_ASK}"
    shown = sorted(set(re.findall(r"<image (\d)>", text)))
    images = tuple(image(row[f"image_{number}"]) for number in shown)
    subject = re.sub(r"^[^_]+_(.+)_\d+$", r"\1", row["id"])  # validation_Accounting_1
    return Question(subject, text, images, len(options), row["answer"])


def _seed_bench(row: Mapping[str, Any], image: Callable[[Any], Path | bytes]) -> Question:
    options = [row[f"choice_{letter}"] for letter in "abcd"]
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    text = f"{row['question']}\n{_listed(options)}{_ASK}"
    return Question(str(row.get("data_type", "image")), text, tuple(map(image, images)), 4, row["answer"])


def _mmstar(row: Mapping[str, Any], image: Callable[[Any], Path | bytes]) -> Question:
    text = f"{row['question'].strip()}{ASK_FOR_A_LETTER}"  # its choices are in the question
    return Question(row["category"], text, (image(row["image"]),), 4, row["answer"].strip().upper())


class Layout(NamedTuple):
    """The fields that tell a layout, and what makes a question of them."""

    fields: frozenset[str]
    question: Callable[[Mapping[str, Any], Callable[[Any], Path | bytes]], Question | None]


LAYOUTS = {
    "ai2d": Layout(frozenset({"question", "options", "answer", "image"}), _ai2d),
    "mmmu": Layout(frozenset({"id", "question", "options", "answer", "question_type", "image_1"}), _mmmu),
    "seed-bench": Layout(frozenset({"question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "image"}),
                         _seed_bench),
    "mmstar": Layout(frozenset({"question", "answer", "category", "l2_category", "image"}), _mmstar),
}  # fmt: skip


def _listed(options: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False))


# Reading.


def _questions(files: Sequence[Path], question: Callable[..., Question | None]) -> Iterator[Question | None]:
    for path in files:
        for number, row in enumerate(_rows(path), 1):
            try:
                read = question(row, lambda value, folder=path.parent: _image(value, folder))
                if read is not None and read.answer not in list(string.ascii_uppercase[: read.choices]):
                    raise ValueError(f"the answer is {read.answer!r}, there are {read.choices} choices")
            except (KeyError, TypeError, ValueError, IndexError, AttributeError, SyntaxError) as error:
                raise BitvlaError(f"{path}: question {number} is not as its layout asks: {error!r}") from None
            yield read


def _image(value: Any, folder: Path) -> Path | bytes:
    """An image as the `datasets` library stores it, or a path."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") else value["path"]
    return value if isinstance(value, bytes) else folder / value


def _columns(path: Path) -> set[str]:
    if _is_parquet(path):
        return set(_parquet(path).schema_arrow.names)
    lines = _lines(path)
    return set(_row(path, lines[0])) if lines else set()


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if _is_parquet(path):
        for batch in _parquet(path).iter_batches(_BATCH):
            yield from batch.to_pylist()
    else:
        for line in _lines(path):
            yield _row(path, line)


def _is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def _parquet(path: Path) -> Any:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise BitvlaError(f"{path} cannot be read as Parquet: {error}") from None


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BitvlaError(f"{path} cannot be read as JSON Lines: {getattr(error, 'strerror', None) or error}") from None


def _row(path: Path, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BitvlaError(f"{path} is not JSON Lines: {error}") from None
    if not isinstance(row, dict):
        raise BitvlaError(f"{path} is not JSON Lines: a line holds no object")
    return row
