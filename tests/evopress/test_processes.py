"""The result of a search does not depend on how many processes share it."""

from pathlib import Path

from ..helpers.processes import run


def test_two_processes_find_what_one_finds(half, database, place, tmp_path):
    script = Path(__file__).with_name("shared_search.py")
    (alone,) = run(script, 1, tmp_path / "one", half, place)
    shared = run(script, 2, tmp_path / "two", half, place)
    assert [record.pop("processes") for record in (alone, *shared)] == [1, 2, 2]
    assert shared == [alone, alone]
