"""Failures are sorted by what happened to hand and things, and the kinds reach the record."""

from dataclasses import dataclass, field

import pytest

from bitvla.evaluate.failures import CARRIED, NEAR, Watch
from bitvla.sim.base import Moment


@dataclass
class Trace:
    """Moments of a scene with a soup that belongs into a basket, a milk and a stove; each changes what it names."""

    now: dict = field(
        default_factory=lambda: {
            "hand": (0.0, 0.0, 0.3),
            "opening": 1.0,
            "at": {"soup": (0.0, 0.0, 0.0), "milk": (0.3, 0.0, 0.0), "basket": (0.0, 0.4, 0.0), "stove": (0.6, 0, 0)},
            "touched": set(),
            "held": set(),
            "wanted": {"soup": True},
            "named": {"soup", "basket"},
        }
    )
    moments: list = field(default_factory=list)

    def then(self, **changes):
        if "move" in changes:
            self.now["at"] = self.now["at"] | changes.pop("move")
        self.now |= changes
        self.moments.append(Moment(**self.now))
        return self

    def failure(self):
        watch = Watch(self.moments[0])
        for moment in self.moments[1:]:
            watch.see(moment)
        return watch.failure()


LIFTED = (0.0, 0.0, CARRIED + 0.01)
OVER_MILK = (0.3, 0.0, CARRIED + 0.01)


@pytest.mark.parametrize(
    ("trace", "kind"),
    [
        # It waved about, or closed far from everything.
        (Trace().then().then(hand=(0.2, 0.2, 0.2)), "other"),
        (Trace().then().then(hand=(0.0, 0.0, NEAR + 0.01), opening=0.1), "other"),
        # Near the soup with an open hand is not yet a grasp; a closed one is.
        (Trace().then().then(hand=(0.0, 0.0, NEAR - 0.01)), "other"),
        (Trace().then().then(hand=(0.0, 0.0, NEAR - 0.01), opening=0.1), "spatial localisation"),
        # One finger pushed it.
        (Trace().then().then(hand=(0.0, 0.0, 0.01), opening=0.1, touched={"soup"}), "spatial localisation"),
        # An open hand came down on it.
        (Trace().then().then(hand=(0.0, 0.0, 0.05), touched={"soup"}), "spatial localisation"),
        # Held, then dropped; a miss before does not matter.
        (Trace().then().then(held={"soup"}).then(held=set()), "trajectory planning"),
        (
            Trace().then().then(hand=(0.0, 0.0, 0.01), opening=0.1).then(held={"soup"}, move={"soup": LIFTED}),
            "trajectory planning",
        ),
        # Another thing was carried, pinched where it stood, or pushed.
        (Trace().then().then(held={"milk"}, move={"milk": OVER_MILK}), "goal misunderstanding"),
        (Trace().then().then(held={"milk"}), "other"),
        (Trace().then().then(touched={"milk"}, move={"milk": OVER_MILK}), "other"),
        # What the goal names may be moved: the basket is no misunderstanding.
        (Trace().then().then(held={"basket"}, move={"basket": (0.0, 0.0, 0.4)}), "other"),
        # What is not to be carried is reached by a touch.
        (Trace().then(wanted={"stove": False}).then(touched={"stove"}), "trajectory planning"),
        (Trace().then(wanted={"stove": False}).then(hand=(0.6, 0, 0.05), opening=0.0), "spatial localisation"),
        # The soup was brought, the milk never held: the part that is not done decides.
        (
            Trace().then(wanted={"soup": True, "milk": True}, named={"soup", "milk", "basket"})
            .then(held={"soup"}).then(held=set(), wanted={"milk": True}).then(hand=(0.3, 0, 0.05), opening=0.1),
            "spatial localisation",
        ),
    ],
)  # fmt: skip
def test_a_failure_has_the_kind_of_what_happened(trace, kind):
    assert trace.failure() == kind
