"""What is told of long work, and when: by lines without a terminal, with the time that is left."""

from quantkit.cli.display import without_prefix
from quantkit.cli.progress import Clock, duration, lines


class Hand:
    """A clock that is moved by hand."""

    def __init__(self):
        self.at = 0.0

    def __call__(self):
        return self.at


def test_time_left_follows_the_latest_steps():
    hand = Hand()
    clock = Clock(hand)
    assert clock.left(10) is None
    for step in range(1, 4):
        hand.at += 40
        clock.reached(step)
    assert clock.left(10) == 7 * 40
    hand.at += 15  # a step is under way
    assert clock.left(10) == 7 * 40 - 15
    assert clock.left(None) is None


def test_blocks_of_an_earlier_run_are_no_measure_of_those_to_come():
    hand = Hand()
    clock = Clock(hand)
    for step in range(1, 9):  # passed, not made
        hand.at += 1
        clock.reached(step)
    hand.at += 100
    clock.reached(9)
    assert clock.left(12) == 300


def test_a_second_pass_begins_anew():
    hand = Hand()
    clock = Clock(hand)
    for done in (1, 2, 0, 1):
        hand.at += 10
        clock.reached(done)
    assert clock.left(3) == 20


def test_a_line_a_step_and_one_for_the_last():
    hand, said = Hand(), []
    tell = lines(said.append, 0, hand)
    tell("blocks", 0, 3, "model.layers.0")
    for step, name in enumerate(("model.layers.1", "model.layers.2", ""), 1):
        hand.at += 60
        tell("blocks", step, 3, name)
        tell("blocks", step, 3, f"{name}, tuning 1/9")  # no step
    assert said == [
        "blocks  1/3  0:01:00  ETA 0:02:00  model.layers.1",
        "blocks  2/3  0:02:00  ETA 0:01:00  model.layers.2",
        "blocks  3/3  0:03:00",
    ]


def test_quick_steps_are_told_of_now_and_then():
    hand, said = Hand(), []
    tell = lines(said.append, 10, hand)
    for step in range(1, 101):
        hand.at += 1
        tell("sequences", step, 100)
    assert len(said) == 10
    assert said[-1] == "sequences  100/100  0:01:40"
    assert duration(3661.4) == "1:01:01"


def test_names_are_short_enough_for_a_row():
    names = ["model.layers.0.mlp.up_proj", "model.layers.11.mlp.up_proj", "lm_head"]
    assert without_prefix(names) == ("model.layers", ["0.mlp.up_proj", "11.mlp.up_proj", "lm_head"])
    mixed = ["encoder.layers.0.fc", "decoder.layers.0.fc"]
    assert without_prefix(mixed) == ("", mixed)
    assert without_prefix(["lm_head"]) == ("", ["lm_head"])
