"""What people say to the robot: several sentences a task.

Training sentences go into recorded demonstrations. Held-out sentences are for evaluation: new
sentences, made only of words that occur in training sentences.
"""

from __future__ import annotations

import numpy as np

from bitvla.errors import BitvlaError

# task -> (training sentences, held-out sentences)
_SENTENCES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "reach": (
        (
            "reach the target",
            "reach for the goal marker",
            "move the gripper to the target",
            "move the hand to the goal",
            "bring the gripper to the small ball",
            "go to the target point",
            "touch the marker with the gripper",
            "take the hand to the marker",
            "guide the arm to the goal position",
            "put the gripper at the target",
            "stretch the arm out to the marker",
            "leave the puck alone and go to the target",
            "without touching the puck, move the hand to the ball",
            "place the gripper on the goal marker",
            "extend the arm until the gripper is at the ball",
            "the hand should go to the marker",
        ),
        (
            "move the arm to the marker",
            "bring the hand to the target point",
            "guide the gripper to the goal position",
            "go to the small ball with the hand",
            "leave the puck alone and touch the goal",
        ),
    ),
    "push": (
        (
            "push the puck to the goal",
            "push the red cylinder to the target",
            "slide the puck to the marker",
            "slide the puck across the table to the goal",
            "move the puck along the table to the target",
            "shove the puck over to the marker",
            "push the red puck onto the goal spot",
            "get the puck to the goal by pushing it",
            "nudge the cylinder until it is at the target",
            "drag the puck over the table to the goal marker",
            "the puck should slide to the target",
            "push that puck onto the marker",
            "use the gripper to push the puck to the goal",
            "keep the puck on the table and move it to the target spot",
            "slide the red cylinder over to the goal",
            "shove the red cylinder across to the marker",
        ),
        (
            "slide the red puck to the target spot",
            "push the cylinder across the table to the marker",
            "move the red cylinder along the table to the goal",
            "use the gripper to slide the puck onto the goal spot",
            "shove the puck to the goal",
        ),
    ),
    "pick-place": (
        (
            "pick up the puck and place it at the goal",
            "pick the puck up and bring it to the target",
            "lift the puck and hold it at the marker",
            "grasp the red cylinder and carry it to the target",
            "grab the puck and move it up to the goal",
            "take the puck to the target in the air",
            "raise the puck to the goal marker",
            "lift the red cylinder up to the marker",
            "pick up the red puck and put it at the target",
            "carry the puck to the goal",
            "grab the cylinder, lift it and place it at the goal",
            "get hold of the puck and bring it up to the marker",
            "the puck should be lifted to the target",
            "hold the puck in the gripper and take it to the goal",
            "pick and place the puck at the marker",
            "lift that puck off the table and carry it to the goal",
        ),
        (
            "grasp the puck and lift it to the goal marker",
            "pick up the red cylinder and hold it at the target",
            "carry the red puck up to the marker",
            "grab the puck and place it at the target",
            "lift the cylinder off the table and bring it to the goal",
        ),
    ),
    "door-open": (
        (
            "open the door",
            "pull the door open",
            "swing the door open",
            "open the door by its handle",
            "pull on the handle to open the door",
            "get the door open",
            "move the door to its open position",
            "hook the handle and swing the door open",
            "use the handle to pull the door",
            "the door should be open",
            "open up the door",
            "make the door swing open",
            "drag the door open by the handle",
            "take the handle and open the door wide",
            "go to the door handle and pull",
            "the closed door has to be opened",
        ),
        (
            "use the handle to swing the door open",
            "pull the door wide open",
            "get the door open by its handle",
            "open up the closed door",
            "hook the door handle and pull it open",
        ),
    ),
    "drawer-open": (
        (
            "open the drawer",
            "pull the drawer open",
            "pull the drawer out",
            "slide the drawer out",
            "open the drawer by its handle",
            "pull on the drawer handle",
            "get the drawer open",
            "drag the drawer out of the cabinet",
            "hook the drawer handle and pull it out",
            "the drawer should be open",
            "make sure the drawer is fully open",
            "use the handle to pull the drawer out",
            "draw the drawer out all the way",
            "move the drawer to its open position",
            "open up the cabinet drawer",
            "take the handle and slide the drawer open",
        ),
        (
            "slide the drawer open by its handle",
            "pull the cabinet drawer out all the way",
            "use the handle to open the drawer",
            "drag the drawer open",
            "get the drawer out of the cabinet",
        ),
    ),
    "drawer-close": (
        (
            "close the drawer",
            "push the drawer closed",
            "push the drawer in",
            "slide the drawer shut",
            "shut the drawer",
            "push on the drawer handle to close it",
            "get the drawer closed",
            "push the drawer back into the cabinet",
            "press the drawer in until it is shut",
            "the drawer should be closed",
            "make sure the drawer is fully closed",
            "use the gripper to shove the drawer in",
            "slide the drawer back in all the way",
            "move the drawer to its closed position",
            "shut the cabinet drawer",
            "shove the open drawer closed",
        ),
        (
            "slide the drawer back into the cabinet",
            "push the cabinet drawer shut",
            "shove the drawer in until it is closed",
            "close the open drawer all the way",
            "use the gripper to shut the drawer",
        ),
    ),
    "button-press-topdown": (
        (
            "press the button",
            "push the button down",
            "press the red button from above",
            "press down on the button",
            "hit the button from the top",
            "push down the button on top of the box",
            "go over the button and press it",
            "the button should be pressed",
            "activate the button",
            "lower the gripper onto the button",
            "use the gripper to push the button down",
            "move the hand down until the button is pressed",
            "give the button a push from above",
            "press the button on the box",
            "get the red button down",
            "touch the button from above and press",
        ),
        (
            "push the red button down from the top",
            "use the gripper to press the button",
            "lower the hand onto the button and press it",
            "hit the red button on top of the box",
            "press down the button from above",
        ),
    ),
    "peg-insert-side": (
        (
            "insert the peg into the hole",
            "put the peg in the hole",
            "push the peg into the side of the box",
            "pick up the peg and insert it in the hole",
            "grasp the peg and put it into the box from the side",
            "plug the peg into the hole",
            "slide the peg into the hole in the box",
            "take the green stick and insert it into the box",
            "grab the peg, lift it and push it into the hole",
            "insert the green peg in the side of the box",
            "the peg should go into the hole",
            "place the peg inside the box hole",
            "fit the peg into the hole at the side",
            "bring the peg to the box and insert it",
            "get the peg into the hole",
            "lift the stick and slide it into the box",
        ),
        (
            "pick up the green peg and put it in the hole",
            "insert the stick into the side of the box",
            "grasp the peg and slide it into the hole",
            "fit the green stick into the box",
            "take the peg and plug it into the hole",
        ),
    ),
    "window-open": (
        (
            "open the window",
            "slide the window open",
            "push the window open",
            "move the window to the right to open it",
            "open the window by its handle",
            "push the window handle to the right",
            "get the window open",
            "slide the glass to the open side",
            "the window should be open",
            "make sure the window is fully open",
            "use the handle to slide the window open",
            "move the window to its open position",
            "let some air in, open the window",
            "open up the sliding window",
            "take the handle and push the window open",
            "shove the window open all the way",
        ),
        (
            "slide the window handle to the right",
            "use the handle to open the window",
            "push the sliding window open all the way",
            "move the glass to the right to open it",
            "get the window fully open",
        ),
    ),
    "window-close": (
        (
            "close the window",
            "slide the window closed",
            "push the window shut",
            "move the window to the left to close it",
            "close the window by its handle",
            "push the window handle to the left",
            "get the window closed",
            "slide the glass back to the closed side",
            "the window should be closed",
            "make sure the window is fully closed",
            "use the handle to slide the window shut",
            "move the window to its closed position",
            "keep the wind out, shut the window",
            "shut the sliding window",
            "take the handle and push the window closed",
            "shove the window shut all the way",
        ),
        (
            "slide the window handle to the left",
            "use the handle to close the window",
            "push the sliding window shut all the way",
            "move the glass to the left to close it",
            "get the window fully closed",
        ),
    ),
}


def sentences(task: str, split: str = "train") -> tuple[str, ...]:
    """All sentences of a task; ``split`` is ``train`` or ``heldout``.

    Raises:
        BitvlaError: unknown task or split.
    """
    name = task.removesuffix("-v3")
    if name not in _SENTENCES:
        raise BitvlaError(f"no instructions for task '{task}': use a Meta-World v3 task name")
    if split not in ("train", "heldout"):
        raise BitvlaError(f"unknown instruction split '{split}': use 'train' or 'heldout'")
    return _SENTENCES[name][0 if split == "train" else 1]


def instruction(task: str, choice: int | np.random.Generator, split: str = "train") -> str:
    """One sentence of a task: by number (any integer, taken modulo) or drawn by a generator."""
    options = sentences(task, split)
    if isinstance(choice, np.random.Generator):
        return options[int(choice.integers(len(options)))]
    return options[choice % len(options)]
