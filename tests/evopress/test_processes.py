"""What a search makes does not depend on how many processes share it."""

from pathlib import Path

from ..helpers.checkpoints import digest
from ..helpers.processes import run

SCRIPT = Path(__file__).with_name("shared_search.py")


def test_two_processes_make_the_candidates_of_one_and_find_what_it_finds(half, tmp_path):
    (alone,) = run(SCRIPT, 1, tmp_path / "one", "same", half)
    first, second = run(SCRIPT, 2, tmp_path / "two", "same", half)
    assert [alone, first, second] == ["found", "found", "nothing"], "the first process has what was found"
    for made in ("candidates", "model"):
        assert digest(tmp_path / "two" / made) == digest(tmp_path / "one" / made)


def test_processes_that_are_asked_for_different_candidates_make_none(half, tmp_path):
    first, second = run(SCRIPT, 2, tmp_path / "two", "differing", half)
    assert "is not what the first process is asked for" in second
    assert first == second
    assert not (tmp_path / "two" / "candidates").exists()
