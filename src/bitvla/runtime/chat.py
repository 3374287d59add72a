"""Talking to a language model in a terminal: one prompt, or turn after turn."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bitvla.errors import BitvlaError
from bitvla.processing.images import read_image
from bitvla.runtime.language import Conversation, Image, LanguageModel, Sampler


def chat(
    source: Path,
    prompt: str | None = None,
    *,
    images: Sequence[Path] = (),
    max_tokens: int = 256,
    sampler: Sampler,
    threads: int | None = None,
) -> None:
    """Answer `prompt` on standard output as it is written; without one, what the user types, until the end of it.

    The files `images` belong to the first prompt.
    """
    seen = [read_image(path) for path in images]
    conversation = Conversation(LanguageModel.load(source, threads))
    if prompt is None and not sys.stdin.isatty():
        prompt = _given(sys.stdin.read)
    if prompt is not None:
        _print_answer(conversation, prompt, seen, max_tokens, sampler)
        return
    while True:
        try:
            _print_answer(conversation, _given(partial(input, "> ")), seen, max_tokens, sampler)
            seen = []
        except EOFError:
            print()
            return
        except BitvlaError as error:  # such a prompt is not a reason to end the conversation
            print(f"error: {error}", file=sys.stderr)


def answer(
    source: Path,
    prompt: str | None = None,
    *,
    images: Sequence[Path] = (),
    max_tokens: int = 256,
    sampler: Sampler,
    threads: int | None = None,
) -> dict[str, Any]:
    """The answer to `prompt`, or to standard input, as a record: the text, its tokens, and milliseconds."""
    seen = [read_image(path) for path in images]
    conversation = Conversation(LanguageModel.load(source, threads))
    prompt = _given(sys.stdin.read) if prompt is None else prompt
    text = "".join(conversation.say(prompt, images=seen, max_tokens=max_tokens, sampler=sampler))
    first, *others = conversation.milliseconds
    return {
        "prompt": prompt,
        "images": [str(path) for path in images],
        "answer": text,
        "prompt_tokens": len(conversation.ids) - 1 - len(others),
        "answer_tokens": 1 + len(others),
        "ended": conversation.ended,
        "prompt_ms": first,
        "ms_a_token": statistics.median(others) if others else None,
    }


def _given(read: Callable[[], str]) -> str:
    """What `read` finds on standard input; BitvlaError where that is not text."""
    try:
        return read()
    except UnicodeDecodeError as error:
        raise BitvlaError(
            f"standard input is not {error.encoding} text: {error.reason}, at byte {error.start}"
        ) from None


def _print_answer(
    conversation: Conversation, prompt: str, images: Sequence[Image], max_tokens: int, sampler: Sampler
) -> None:
    pieces = conversation.say(prompt, images=images, max_tokens=max_tokens, sampler=sampler)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:  # also where the user interrupts
        print(flush=True)
