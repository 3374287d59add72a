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
    # The rest of MT50.
    "assembly": (
        (
            "put the ring on the peg",
            "pick up the wrench by its ring and place it over the peg",
            "fit the ring onto the pole",
            "assemble the ring and the pole",
        ),
        (
            "place the ring over the pole",
            "pick up the ring and fit it onto the peg",
        ),
    ),
    "basketball": (
        (
            "put the ball into the basket",
            "dunk the basketball into the hoop",
            "pick up the basketball and drop it through the hoop",
            "score with the orange ball",
        ),
        (
            "drop the orange ball into the basket",
            "pick up the ball and put it through the hoop",
        ),
    ),
    "bin-picking": (
        (
            "move the block from one bin to the other",
            "pick the cube out of the bin and put it in the other bin",
            "take the block to the second bin",
            "carry the cube over into the other bin",
        ),
        (
            "pick the block out of the bin and carry it to the second bin",
            "move the cube over to the other bin",
        ),
    ),
    "box-close": (
        (
            "close the box with the lid",
            "put the lid on the box",
            "pick up the lid and place it on top of the box",
            "cover the box",
        ),
        (
            "cover the box with the lid",
            "pick up the lid and close the box",
        ),
    ),
    "button-press-topdown-wall": (
        (
            "reach over the wall and press the button from above",
            "press the button behind the wall from the top",
            "go over the wall and push the red button down",
            "press down the button on the other side of the wall",
        ),
        (
            "push down the red button behind the wall",
            "go over the wall and press the button from above",
        ),
    ),
    "button-press": (
        (
            "press the button from the front",
            "push the button on the side of the box in",
            "press the front button",
            "push the red button forward",
        ),
        (
            "push the front button in",
            "press the red button on the side of the box",
        ),
    ),
    "button-press-wall": (
        (
            "go around the wall and press the button from the front",
            "press the front button behind the wall",
            "pass over the wall and push the button forward",
            "push in the button on the far side of the wall",
        ),
        (
            "go around the wall and push the front button in",
            "press the button forward on the far side of the wall",
        ),
    ),
    "coffee-button": (
        (
            "press the button of the coffee machine",
            "start the coffee machine",
            "make a coffee with the machine",
            "push the button to brew a coffee",
        ),
        (
            "push the button of the coffee machine",
            "press the button to start a coffee",
        ),
    ),
    "coffee-pull": (
        (
            "pull the mug away from the coffee machine",
            "take the cup out of the coffee machine",
            "drag the mug from under the coffee machine",
            "bring the cup of coffee to the marker",
        ),
        (
            "pull the cup out from under the coffee machine",
            "drag the mug of coffee to the marker",
        ),
    ),
    "coffee-push": (
        (
            "push the mug under the coffee machine",
            "slide the cup up to the coffee machine",
            "put the mug below the coffee machine",
            "move the cup to the coffee machine",
        ),
        (
            "slide the mug under the coffee machine",
            "push the cup up to the coffee machine",
        ),
    ),
    "dial-turn": (
        (
            "turn the dial",
            "rotate the dial half a turn",
            "twist the knob around",
            "turn the knob with the gripper",
        ),
        (
            "rotate the knob",
            "twist the dial around with the gripper",
        ),
    ),
    "disassemble": (
        (
            "take the ring off the peg",
            "pull the wrench off the pole",
            "lift the ring up and off the pole",
            "remove the ring from the peg",
        ),
        (
            "remove the ring from the pole",
            "lift the wrench off the peg",
        ),
    ),
    "door-close": (
        (
            "close the door",
            "push the door shut",
            "swing the door closed",
            "shut the safe door",
        ),
        (
            "swing the door shut",
            "close the safe door",
        ),
    ),
    "door-lock": (
        (
            "lock the door",
            "turn the lock of the door clockwise",
            "rotate the lock to lock the door",
            "press the lock down",
        ),
        (
            "turn the lock down to lock the door",
            "rotate the lock of the door clockwise",
        ),
    ),
    "door-unlock": (
        (
            "unlock the door",
            "turn the lock of the door counterclockwise",
            "rotate the lock to unlock the door",
            "release the lock of the door",
        ),
        (
            "turn the lock to unlock the door",
            "rotate the lock of the door counterclockwise",
        ),
    ),
    "hand-insert": (
        (
            "put the gripper into the hole in the table",
            "insert the hand into the hole of the table",
            "lower the gripper into the hole",
            "reach down into the opening of the table",
        ),
        (
            "lower the hand into the hole in the table",
            "reach down into the hole with the gripper",
        ),
    ),
    "faucet-open": (
        (
            "open the faucet",
            "turn on the tap",
            "rotate the faucet handle counterclockwise",
            "let the water run",
        ),
        (
            "turn on the faucet",
            "rotate the tap handle counterclockwise",
        ),
    ),
    "faucet-close": (
        (
            "close the faucet",
            "turn off the tap",
            "rotate the faucet handle clockwise",
            "stop the water",
        ),
        (
            "turn off the faucet",
            "rotate the tap handle clockwise",
        ),
    ),
    "hammer": (
        (
            "hammer the nail into the board",
            "pick up the hammer and drive the nail in",
            "hit the nail with the hammer",
            "use the hammer on the nail",
        ),
        (
            "use the hammer and drive the nail into the board",
            "pick up the hammer and hit the nail",
        ),
    ),
    "handle-press-side": (
        (
            "press the handle down from the side",
            "push the lever at the side down",
            "press the side handle",
            "lower the handle on the side",
        ),
        (
            "push the side handle down",
            "press down the lever on the side",
        ),
    ),
    "handle-press": (
        (
            "press the handle down",
            "push the handle in front down",
            "lower the handle",
            "press down on the front handle",
        ),
        (
            "push down on the handle",
            "lower the front handle",
        ),
    ),
    "handle-pull-side": (
        (
            "pull the handle up from the side",
            "lift the side handle up",
            "raise the handle at the side",
            "pull up the lever on the side",
        ),
        (
            "raise the side handle",
            "pull the lever at the side up",
        ),
    ),
    "handle-pull": (
        (
            "pull the handle up",
            "lift the handle in front",
            "raise the front handle up",
            "pull up on the handle",
        ),
        (
            "lift the front handle up",
            "raise the handle in front",
        ),
    ),
    "lever-pull": (
        (
            "pull the lever up",
            "raise the lever until it points up",
            "lift the lever by its end",
            "turn the lever upwards",
        ),
        (
            "lift the lever until it points up",
            "pull the lever upwards",
        ),
    ),
    "pick-place-wall": (
        (
            "pick up the puck and carry it over the wall to the target",
            "lift the puck over the wall and place it at the goal",
            "bring the puck to the goal behind the wall",
            "grasp the puck, pass the wall and put it at the target",
        ),
        (
            "lift the puck over the wall and put it at the target",
            "grasp the puck and carry it to the goal behind the wall",
        ),
    ),
    "pick-out-of-hole": (
        (
            "pick the puck out of the hole",
            "lift the puck out of the hole and bring it to the goal",
            "take the puck from the hole",
            "get the puck up out of the hole",
        ),
        (
            "take the puck out of the hole and bring it to the goal",
            "lift the puck up from the hole",
        ),
    ),
    "plate-slide": (
        (
            "slide the plate into the cabinet",
            "push the plate into the goal frame",
            "shove the plate forward into the frame",
            "slide the disc into the goal",
        ),
        (
            "push the plate forward into the cabinet",
            "slide the plate into the goal frame",
        ),
    ),
    "plate-slide-side": (
        (
            "slide the plate sideways into the cabinet",
            "push the plate to the side into the goal frame",
            "move the plate sideways into the frame",
            "shove the plate to the left into the cabinet",
        ),
        (
            "push the plate sideways into the cabinet",
            "move the plate to the side into the frame",
        ),
    ),
    "plate-slide-back": (
        (
            "slide the plate back out of the cabinet",
            "pull the plate back to the marker",
            "drag the plate out of the frame",
            "bring the plate back from the cabinet",
        ),
        (
            "drag the plate back out of the cabinet",
            "pull the plate out of the frame to the marker",
        ),
    ),
    "plate-slide-back-side": (
        (
            "slide the plate sideways out of the cabinet",
            "pull the plate to the side out of the frame",
            "drag the plate sideways to the marker",
            "bring the plate out sideways",
        ),
        (
            "drag the plate to the side out of the cabinet",
            "pull the plate out sideways to the marker",
        ),
    ),
    "peg-unplug-side": (
        (
            "unplug the peg",
            "pull the peg out of the box",
            "take the plug out of the socket sideways",
            "remove the peg from the hole at the side",
        ),
        (
            "pull the plug out of the box",
            "remove the peg from the socket",
        ),
    ),
    "soccer": (
        (
            "kick the ball into the goal",
            "push the soccer ball into the net",
            "score a goal with the ball",
            "roll the ball into the net",
        ),
        (
            "push the ball into the goal",
            "kick the soccer ball into the net",
        ),
    ),
    "stick-push": (
        (
            "push the box with the stick",
            "pick up the blue stick and push the bottle with it",
            "use the stick to push the bottle to the goal",
            "grab the stick and shove the container",
        ),
        (
            "use the blue stick to push the container",
            "grab the stick and push the bottle to the goal",
        ),
    ),
    "stick-pull": (
        (
            "pull the box with the stick",
            "hook the handle with the stick and pull the container",
            "use the stick to pull the bottle to the goal",
            "grab the blue stick and drag the container with it",
        ),
        (
            "use the blue stick to drag the container",
            "hook the bottle with the stick and pull it to the goal",
        ),
    ),
    "push-wall": (
        (
            "push the puck around the wall to the goal",
            "slide the puck past the wall to the target",
            "go around the wall with the puck and stop at the goal",
            "bypass the wall and push the puck to the marker",
        ),
        (
            "slide the puck around the wall to the marker",
            "push the puck past the wall to the goal",
        ),
    ),
    "push-back": (
        (
            "push the puck back towards the robot",
            "pull the puck backwards to the goal",
            "slide the block back to the target",
            "bring the puck back to the marker",
        ),
        (
            "slide the puck backwards to the goal",
            "pull the block back towards the robot",
        ),
    ),
    "reach-wall": (
        (
            "reach over the wall to the target",
            "go around the wall and touch the goal marker",
            "move the gripper past the wall to the target",
            "bring the hand to the goal behind the wall",
        ),
        (
            "reach past the wall to the goal marker",
            "move the hand over the wall to the target",
        ),
    ),
    "shelf-place": (
        (
            "put the block on the shelf",
            "pick up the cube and place it on the shelf",
            "lift the block onto the shelf",
            "store the cube on the shelf",
        ),
        (
            "pick up the block and store it on the shelf",
            "lift the cube onto the shelf",
        ),
    ),
    "sweep-into": (
        (
            "sweep the block into the hole",
            "push the cube over the table into the hole",
            "sweep the cube off into the opening",
            "brush the block into the hole of the table",
        ),
        (
            "sweep the cube into the hole of the table",
            "brush the block off into the opening",
        ),
    ),
    "sweep": (
        (
            "sweep the block off the table",
            "brush the cube off the table edge",
            "sweep the cube over the side of the table",
            "push the block off the table",
        ),
        (
            "brush the block over the side of the table",
            "push the cube off the table edge",
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
