"""Visual question answering: a vision-language model answers multiple-choice questions, and nothing answered is lost.

The model writes its likeliest tokens, and the letter that they begin with is its choice, as in lmms-eval, with which
the published accuracies were measured. Another text than a letter is a wrong answer; nothing is guessed for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

import bitvla
import bitvla._native as native
from bitvla.config import to_dict
from bitvla.convert.source import sha256
from bitvla.errors import BitvlaError
from bitvla.evaluate.files import Journal, save
from bitvla.evaluate.questions import Question, chosen_letter, count_questions, read_questions
from bitvla.evaluate.record import Machine, Record
from bitvla.evaluate.result import Comparison, check_same
from bitvla.evaluate.rollout import ERRORS_IN_A_ROW, machine
from bitvla.evaluate.statistics import Latency, Rate, latency, paired, rate_of
from bitvla.processing.images import read_image
from bitvla.processing.prompt import NO_TOWER
from bitvla.runtime.language import Conversation, LanguageModel

FORMAT = 1
MAX_TOKENS = 16  # of an answer, in lmms-eval


class Rules(Record, frozen=True, kw_only=True):
    """Results are comparable when these are equal. `files` are the names of the questions' files by their SHA-256, in
    the order in which they are asked; `limit` is how many questions were asked, from the first on, None for all."""

    format: int = FORMAT
    layout: str
    files: dict[str, str]
    limit: int | None
    max_tokens: int
    model: str


class Answer(Record, frozen=True, kw_only=True):
    """What a model answered to a question. `error` says why one could not be asked; it then counts as wrong."""

    number: int
    category: str
    written: str = ""
    chosen: str | None = None
    expected: str
    milliseconds: float = 0.0
    error: str | None = None

    @property
    def job(self) -> int:
        return self.number

    @property
    def correct(self) -> bool:
        return self.chosen == self.expected


class VqaResult(Record, frozen=True, kw_only=True):
    """A whole evaluation. `without_letter` counts answers that chose nothing, `skipped` questions without choices."""

    date: str
    rules: Rules
    model: str
    isa: str
    threads: int
    bitvla: str
    machine: Machine
    wall_seconds: float
    total: Rate
    categories: dict[str, Rate]
    without_letter: int
    errors: int
    skipped: int
    latency: Latency | None
    answers: tuple[Answer, ...]


def evaluate(
    source: Path,
    files: Sequence[Path],
    *,
    limit: int | None = None,
    max_tokens: int = MAX_TOKENS,
    threads: int | None = None,
    out: Path | None = None,
    resume: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> VqaResult:
    """Ask the model in `source` the questions in `files` and return the result, with the 95 % interval of its accuracy.

    `out` is where the result is written (JSON). Until all could be asked, answers lie beside it in OUT.partial.jsonl,
    and the same call goes on from them; `resume=False` starts anew. Raises BitvlaError for a model that sees no images,
    for files that are no questions, and where the first questions all cannot be asked.
    """
    start = time.perf_counter()
    layout, questions = read_questions(files)
    rows = count_questions(files)
    total = min(rows, limit or rows)
    model = LanguageModel.load(source, threads)
    if model.vision is None:
        raise BitvlaError(f"{source}: {NO_TOWER}")
    names = {sha256(path): path.name for path in files}
    if len(names) < len(files):
        raise BitvlaError(f"{', '.join(map(str, files))}: two of these are the same questions; leave one out")
    rules = Rules(
        layout=layout,
        files=names,
        limit=limit,
        max_tokens=max_tokens,
        model=model.bundle.sha256,
    )
    skipped, conversation = 0, None
    with Journal(out, rules, Answer, resume) as journal:
        for number, question in _first(questions, limit):
            if question is None:
                skipped += 1
            elif number not in journal.entries:
                # Questions about one image stand together: it is read once.
                conversation = Conversation(model, after=conversation)
                journal.add(_ask(conversation, number, question, max_tokens))
                _stop_when_nothing_works(journal, min(ERRORS_IN_A_ROW, total))
            if progress:
                progress(number + 1, total, "")
        answers = sorted(journal.entries.values(), key=lambda answer: answer.number)
        result = _summarize(rules, model, answers, skipped, time.perf_counter() - start)
        if out is not None:
            save(result, out)
        journal.complete = not result.errors
    return result


def is_result(path: Path) -> bool:
    """Is a record one of answers, not of episodes?"""
    with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeError):
        return "answers" in msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
    return False


def compare(a: VqaResult, b: VqaResult) -> Comparison:
    """Compare two models question by question, in all and in each category; those of the same rules, but for the model.

    Raises BitvlaError when the rules differ, or a question could not be asked.
    """
    check_same("rule", *({**to_dict(result.rules), "model": ""} for result in (a, b)))
    pairs = list(zip(a.answers, b.answers, strict=True))
    for answers in pairs:
        for answer in answers:
            if answer.error is not None:
                raise BitvlaError(f"cannot compare: question {answer.number} was not asked ({answer.error}); ask again")
    if not pairs:
        raise BitvlaError("cannot compare: no question was asked in these records; ask some that have choices")
    categories = {
        category: paired(*zip(*((x.correct, y.correct) for x, y in pairs if x.category == category), strict=True))
        for category in a.categories
    }
    total = paired([x.correct for x, _ in pairs], [y.correct for _, y in pairs])
    titles = {name: f"{result.model} {result.rules.model[:7]}" for name, result in (("a", a), ("b", b))}
    return Comparison(**titles, total=total, tasks=categories, failures={})


def _first(questions: Iterable[Question | None], limit: int | None) -> Iterable[tuple[int, Question | None]]:
    for number, question in enumerate(questions):
        if number == limit:
            return
        yield number, question


def _ask(conversation: Conversation, number: int, question: Question, max_tokens: int) -> Answer:
    start = time.perf_counter()
    answer = Answer(number=number, category=question.category, expected=question.answer)
    try:
        images = [read_image(image, f"an image of question {number}") for image in question.images]
        written = "".join(conversation.say(question.text, images=images, max_tokens=max_tokens))
    except BitvlaError as error:
        return msgspec.structs.replace(answer, error=str(error))
    return msgspec.structs.replace(
        answer,
        written=written,
        chosen=chosen_letter(written, question.choices),
        milliseconds=1e3 * (time.perf_counter() - start),
    )


def _stop_when_nothing_works(journal: Journal[Answer], enough: int) -> None:
    if len(journal.entries) == enough and all(errors := [answer.error for answer in journal.entries.values()]):
        raise BitvlaError(f"stopped: none of the first {enough} questions could be asked: {errors[-1]}")


def _summarize(
    rules: Rules, model: LanguageModel, answers: Sequence[Answer], skipped: int, wall_seconds: float
) -> VqaResult:
    categories = sorted({answer.category for answer in answers})
    return VqaResult(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        rules=rules,
        model=model.config.name,
        isa=model.isa,
        threads=native.num_threads(),
        bitvla=bitvla.__version__,
        machine=machine(),
        wall_seconds=round(wall_seconds, 3),
        total=rate_of(answer.correct for answer in answers),
        categories={name: rate_of(a.correct for a in answers if a.category == name) for name in categories},
        without_letter=sum(answer.chosen is None and answer.error is None for answer in answers),
        errors=sum(answer.error is not None for answer in answers),
        skipped=skipped,
        latency=latency([answer.milliseconds for answer in answers if answer.error is None]),
        answers=tuple(answers),
    )
