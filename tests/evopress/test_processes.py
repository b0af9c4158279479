"""What a search makes does not depend on how many processes share it."""

from pathlib import Path

from ..helpers.checkpoints import digest
from ..helpers.processes import run


def test_two_processes_make_the_candidates_of_one_and_find_what_it_finds(half, tmp_path):
    script = Path(__file__).with_name("shared_search.py")
    (alone,) = run(script, 1, tmp_path / "one", half)
    first, second = run(script, 2, tmp_path / "two", half)
    assert [alone, first, second] == [True, True, False], "the first process has what was found"
    for made in ("candidates", "model"):
        assert digest(tmp_path / "two" / made) == digest(tmp_path / "one" / made)
