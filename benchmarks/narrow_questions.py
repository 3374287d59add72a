"""Conversations with fewer kinds of questions, to distill from data that say less than the teacher knows.

    python benchmarks/narrow_questions.py datasets/scenes/instructions.json datasets/scenes/narrow.json \
        "What is the robot" "Is the gripper" "Is the drawer" "Is the window"

Reads LLaVA's JSON layout and keeps the questions that begin with one of the given words, and their pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bitvla.files import write_whole

IMAGE = "<image>\n"


def kept_of(conversation: list[dict[str, str]], about: tuple[str, ...]) -> list[dict[str, str]]:
    """The turns whose question begins with one of `about`; the picture comes with the first of them."""
    kept = [
        message
        for question, answer in zip(conversation[::2], conversation[1::2], strict=True)
        if question["value"].removeprefix(IMAGE).startswith(about)
        for message in ({**question, "value": question["value"].removeprefix(IMAGE)}, answer)
    ]
    return [{**kept[0], "value": IMAGE + kept[0]["value"]}, *kept[1:]] if kept else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("about", nargs="+")
    args = parser.parse_args()
    entries: list[dict[str, Any]] = [
        {**entry, "conversations": turns}
        for entry in json.loads(args.source.read_text())
        if (turns := kept_of(entry["conversations"], tuple(args.about)))
    ]
    write_whole(args.out, json.dumps(entries, indent=1).encode())
    questions = sum(len(entry["conversations"]) // 2 for entry in entries)
    print(f"{args.out}: {questions} questions about {len(entries)} pictures")


if __name__ == "__main__":
    main()
