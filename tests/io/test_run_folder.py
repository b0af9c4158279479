"""Run folders: one process at a time, continued by the same run alone, and nothing foreign ever lost."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.io import run_folder
from quantkit.io.run_folder import MANIFEST, Output, RunFolder

ONE = {"run": "one"}


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def made(output, content=b"1", **flags):
    """Publishes a folder of two files."""
    target = Output(output, **flags)
    with target.begin(ONE):
        target.write_bytes(target.made("weights"), content)
        target.write_bytes("side.json", b"{}")
        target.write_bytes(target.made("inner/more"), b"22")
        target.publish()


class _Stop(Exception):
    pass


def unfinished(output, identity=ONE, **flags):
    target = Output(output, **flags)
    with pytest.raises(_Stop), target.begin(identity):
        target.write_bytes(target.made("weights"), b"half a run")
        raise _Stop
    return output.with_name(f"{output.name}.partial")


def test_a_folder_appears_whole_and_lists_its_files(tmp_path):
    made(tmp_path / "deep" / "out")
    assert names(tmp_path) == {"deep/out/weights", "deep/out/inner/more", f"deep/out/{MANIFEST}"}
    assert json.loads((tmp_path / "deep/out" / MANIFEST).read_text())["files"] == {"weights": 1, "inner/more": 2}


def test_an_existing_output_is_replaced_only_if_asked(tmp_path):
    out = tmp_path / "out"
    made(out)
    with pytest.raises(QuantkitError, match="already exists; give another `output`, or `overwrite`"):
        Output(out)
    with pytest.raises(QuantkitError, match="already exists, and there is no unfinished run"):
        Output(out, resume=True)
    made(out, b"new", overwrite=True)
    assert (out / "weights").read_bytes() == b"new"
    assert names(tmp_path) == {"out/weights", "out/inner/more", f"out/{MANIFEST}"}


def test_an_empty_folder_is_no_obstacle(tmp_path):
    (tmp_path / "out").mkdir()
    made(tmp_path / "out")
    assert (tmp_path / "out" / "weights").is_file()


@pytest.mark.parametrize("what", ["a file more", "a changed file", "a link", "a file further down"])
def test_foreign_files_in_an_output_are_never_replaced(tmp_path, what):
    out = tmp_path / "out"
    made(out)
    if what == "a file more":
        (out / "notes.txt").write_text("mine")
    elif what == "a changed file":
        (out / "weights").write_text("edited by hand")
    elif what == "a link":
        (out / "weights").unlink()
        (out / "weights").symlink_to(out / "inner" / "more")
    else:
        (out / "inner" / "notes.txt").write_text("mine")
    before = names(out)
    with pytest.raises(QuantkitError, match="which quantkit has not written"):
        Output(out, overwrite=True)
    assert names(out) == before


def test_a_folder_of_another_making_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"quantization_config": {"quant_method": "quantkit"}}')
    for flags in ({"overwrite": True}, {"overwrite": True, "resume": True}):
        with pytest.raises(QuantkitError, match="replaces nothing else"):
            Output(tmp_path / "out", **flags)
    assert names(tmp_path) == {"out/config.json"}


def test_what_comes_into_an_output_during_a_run_is_kept(tmp_path):
    out = tmp_path / "out"
    made(out)
    target = Output(out, overwrite=True)
    with pytest.raises(QuantkitError, match=r"notes\.txt"), target.begin(ONE):
        target.write_bytes(target.made("weights"), b"new")
        (out / "notes.txt").write_text("mine")
        target.publish()
    assert (out / "notes.txt").read_text() == "mine" and (out / "weights").read_bytes() == b"1"
    (out / "notes.txt").unlink()
    made(out, b"new", resume=True, overwrite=True)
    assert (out / "weights").read_bytes() == b"new"


@pytest.mark.parametrize("place", ["notes.txt", "checkpoint/notes.txt", "checkpoint/deep/notes.txt"])
def test_foreign_files_in_an_unfinished_run_are_kept(tmp_path, place):
    partial = unfinished(tmp_path / "out")
    note = partial / place
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text("mine")
    for flags in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(QuantkitError, match=r"notes\.txt, which quantkit has not written"):
            Output(tmp_path / "out", **flags)
    assert note.read_text() == "mine"
    note.unlink()
    made(tmp_path / "out", resume=True)


def test_a_folder_with_the_name_of_a_partial_one_is_kept(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(QuantkitError, match=r"thesis\.txt and is not an unfinished run"):
            Output(tmp_path / "out", **flags)
    assert names(tmp_path) == {"out.partial/thesis.txt"}


def test_an_unfinished_run_is_continued_or_discarded_as_asked(tmp_path):
    out = tmp_path / "out"
    partial = unfinished(out)
    with pytest.raises(QuantkitError, match="`resume` continues it, `overwrite` starts anew"):
        Output(out)
    target = Output(out, resume=True)
    refused = pytest.raises(QuantkitError, match=r'run is "another", and was "one".*`overwrite` starts anew')
    with refused, target.begin({"run": "another"}):
        pass
    with Output(out, resume=True).begin(ONE) as again:
        assert again.path(again.made("weights")).read_bytes() == b"half a run"
    with Output(out, overwrite=True).begin({"run": "another"}) as anew:
        assert not anew.has(anew.made("weights"))
    assert names(partial) == {"run.json"}


def test_an_identity_grows(tmp_path):
    folder = RunFolder(tmp_path / "f", "a thing")
    with folder.begin({"a": 1}):
        folder.identify({"b": [1, 2.5, None]})
        folder.identify({"b": (1, 2.5, None)})
        with pytest.raises(QuantkitError, match="b is 3"):
            folder.identify({"b": 3})
    assert RunFolder(tmp_path / "f", "a thing").differing({"a": 2, "b": [1, 2.5, None]}) == ["a is 2, and was 1"]


def test_nothing_is_made_by_a_refusal(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "deeper" / "out", tmp_path / "file", tmp_path / "..", tmp_path / "."):
        with pytest.raises(QuantkitError), Output(output, tmp_path / "model").begin(ONE):
            pass
    (tmp_path / "model").mkdir()
    for output in (tmp_path / "model", tmp_path, tmp_path / "model" / ".." / "model"):
        with pytest.raises(QuantkitError, match=r"would replace .*model|names no new folder"):
            Output(output, tmp_path / "model", overwrite=True)
    assert names(tmp_path) == {"file"}


_HOLDER = """
import sys, time
from pathlib import Path
from quantkit.io.run_folder import Output
target = Output(Path(sys.argv[1]))
with target.begin({"run": "one"}):
    target.write_bytes(target.made("weights"), b"from the first")
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_at_once_and_the_lock_of_a_killed_one_is_void(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            begun = time.monotonic()
            with pytest.raises(QuantkitError, match=rf"used by process {holder.pid} on .*remove .*run\.lock"):
                Output(tmp_path / "out", **flags)
            assert time.monotonic() - begun < 2
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with Output(tmp_path / "out", resume=True).begin(ONE) as target:
        assert target.path(target.made("weights")).read_bytes() == b"from the first"
    assert "run.lock" not in names(tmp_path / "out.partial")


def _race(folder, queue, all_have_said):
    try:
        with RunFolder(folder, "a cache").begin(ONE):
            queue.put("held")
            all_have_said.wait(30)  # on a busy machine others begin late
    except QuantkitError as error:
        queue.put(str(error))


def test_of_many_that_begin_together_one_holds_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    queue, all_have_said = context.Queue(), context.Event()
    processes = [context.Process(target=_race, args=(tmp_path / "cache", queue, all_have_said)) for _ in range(6)]
    for process in processes:
        process.start()
    outcomes = [queue.get(timeout=30) for _ in processes]
    all_have_said.set()
    for process in processes:
        process.join()
    assert outcomes.count("held") == 1
    assert all("is used by" in outcome for outcome in outcomes if outcome != "held")


@pytest.mark.parametrize("after", ["the old folder is aside", "the new folder has its name"])
def test_a_kill_while_publishing_loses_neither_folder(tmp_path, monkeypatch, after):
    out = tmp_path / "out"
    made(out)
    synced = []

    def stop_at_sync(folder, really=run_folder.sync):
        synced.append(folder)
        if folder == out.parent:
            raise _Stop
        really(folder)

    target = Output(out, overwrite=True)
    with pytest.raises(_Stop), target.begin(ONE):
        target.write_bytes(target.made("weights"), b"new")
        if after == "the old folder is aside":
            monkeypatch.setattr(type(target.path("x")), "rename", _rename_once())
        else:
            monkeypatch.setattr(run_folder, "sync", stop_at_sync)
        target.publish()
    monkeypatch.undo()
    if after == "the old folder is aside":
        assert not out.exists()
        with Output(out, overwrite=True).begin(ONE):
            assert (out / "weights").read_bytes() == b"1", "the old one is back where a new run starts"
        made(out, b"new", overwrite=True)
    else:
        with pytest.raises(QuantkitError, match="already exists"):
            Output(out, resume=True)
        made(out, b"newer", overwrite=True)
    assert names(tmp_path) == {"out/weights", "out/inner/more", f"out/{MANIFEST}"}


def _rename_once():
    """A rename that works once, and then the process dies."""
    import pathlib

    really, done = pathlib.Path.rename, []

    def rename(self, target):
        if done:
            raise _Stop
        done.append(target)
        return really(self, target)

    return rename


def test_a_hostile_list_of_files_reaches_nothing_outside(tmp_path):
    (tmp_path / "folder").mkdir()
    mine = [tmp_path / name for name in ("precious", "absolute", "notes.tmp", "folder/file")]
    for path in mine:
        path.write_text("mine")
    partial = unfinished(tmp_path / "out")
    with open(partial / "run.files", "a") as journal:
        for name in (
            "../precious",
            "../folder/",
            str(tmp_path / "absolute"),
            f"{tmp_path}/folder/",
            "../notes",
            7,
            None,
        ):
            journal.write(json.dumps(name) + "\n")
        journal.write('["half a li')
    with Output(tmp_path / "out", resume=True).begin(ONE):
        pass
    with Output(tmp_path / "out", overwrite=True).begin(ONE):
        pass
    made(tmp_path / "out", overwrite=True)
    listed = {"../precious": 4, str(tmp_path / "absolute"): 4, "weights": 1, "inner/more": 2}
    (tmp_path / "out" / MANIFEST).write_text(json.dumps({"files": listed}))
    made(tmp_path / "out", overwrite=True)
    assert all(path.read_text() == "mine" for path in mine)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_record_is_one_error(tmp_path, content):
    partial = unfinished(tmp_path / "out")
    (partial / "run.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read"):
        Output(tmp_path / "out", resume=True)
    made(tmp_path / "out", overwrite=True)


def test_another_library_writes_and_its_files_are_known(tmp_path):
    def write(folder):
        (folder / "a").write_text("a")
        (folder / "b").mkdir()
        (folder / "b" / "c").write_text("c")

    target = Output(tmp_path / "out")
    with target.begin(ONE):
        target.take(write)
        target.publish()
    assert names(tmp_path) == {"out/a", "out/b/c", f"out/{MANIFEST}"}


def test_a_run_that_is_refused_before_it_made_anything_leaves_nothing(tmp_path):
    with pytest.raises(_Stop), Output(tmp_path / "out").begin(ONE):
        raise _Stop
    assert not list(tmp_path.iterdir())
    partial = unfinished(tmp_path / "out")
    with pytest.raises(_Stop), Output(tmp_path / "out", resume=True).begin(ONE):
        raise _Stop
    assert (partial / "run.json").is_file(), "what was begun before stays"


def test_a_run_of_another_kind_is_not_continued(tmp_path):
    unfinished(tmp_path / "out", {"run": "search", "model": 1})
    refused = pytest.raises(QuantkitError, match=r'run is "quantize", and was "search"')
    with refused, Output(tmp_path / "out", resume=True).begin({"run": "quantize", "model": 1}):
        pass
    refused = pytest.raises(QuantkitError, match="plan is 2, and was null")
    with refused, Output(tmp_path / "out", resume=True).begin({"run": "search", "plan": 2}):
        pass
    with RunFolder(tmp_path / "cache", "a database").begin({}):
        pass
    refused = pytest.raises(QuantkitError, match=r'run is "a cache", and was "a database"')
    with refused, RunFolder(tmp_path / "cache", "a cache").begin({}):
        pass
    (tmp_path / "cache" / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"cannot be read as the identity of a cache.*not as it was written"):
        RunFolder(tmp_path / "cache", "a cache")


def test_what_differs_is_named_setting_by_setting(tmp_path):
    first = {"calibration": {"source": "x" * 80, "seed": 0}, "layers": {str(i): "gptq(3)" for i in range(9)}}
    unfinished(tmp_path / "out", first)
    other = {"calibration": {"source": "x" * 80, "seed": 1}, "layers": {str(i): "gptq(4)" for i in range(9)}}
    refused = pytest.raises(
        QuantkitError, match=r'calibration\.seed is 1, and was 0; layers\.0 is "gptq\(4\)".* and 7 more'
    )
    with refused, Output(tmp_path / "out", resume=True).begin(other):
        pass


def test_an_unfinished_replacement_is_told_from_none(tmp_path):
    out = tmp_path / "out"
    made(out)
    unfinished(out, overwrite=True)
    for flags in ({}, {"resume": True}):
        with pytest.raises(QuantkitError, match="`resume` with `overwrite` continues that run"):
            Output(out, **flags)
    made(out, b"new", resume=True, overwrite=True)
    assert (out / "weights").read_bytes() == b"new"


def test_a_name_that_cannot_be_given_gives_the_old_one_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    made(out)
    target = Output(out, overwrite=True)
    with pytest.raises(QuantkitError, match="whole and cannot be renamed"), target.begin(ONE):
        target.write_bytes(target.made("weights"), b"new")
        with monkeypatch.context() as patched:
            patched.setattr(type(out), "rename", _rename_fails_second())
            target.publish()
    assert (out / "weights").read_bytes() == b"1"
    made(out, b"new", resume=True, overwrite=True)
    assert (out / "weights").read_bytes() == b"new"


def _rename_fails_second():
    import pathlib

    really, calls = pathlib.Path.rename, []

    def rename(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        return really(self, target)

    return rename


def test_a_run_that_was_about_to_publish_keeps_its_state_when_it_goes_on(tmp_path):
    out = tmp_path / "out"
    made(out)
    target = Output(out, overwrite=True)
    with pytest.raises(_Stop), target.begin(ONE):
        target.write_bytes("state", b"state")
        target.write_bytes(target.made("weights"), b"new")
        target.write_json("publishing.json", {})
        raise _Stop
    for _ in range(2):
        with Output(out, resume=True, overwrite=True).begin(ONE) as again:
            assert again.has("state")
            again.empty()


def test_what_a_killed_library_left_is_removed(tmp_path):
    def die(folder):
        (folder / "half").write_text("half")
        raise _Stop

    target = Output(tmp_path / "out")
    with pytest.raises(_Stop), target.begin(ONE):
        target.take(die)
    with Output(tmp_path / "out", resume=True).begin(ONE) as again:
        assert names(again.folder) == {"run.json", "run.files", "run.lock"}

    def full(folder):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(QuantkitError, match="cannot be written"),
        Output(tmp_path / "out", resume=True).begin(ONE) as more,
    ):
        more.take(full)


def test_what_a_run_needs_is_not_inside_its_output(tmp_path):
    with pytest.raises(QuantkitError, match="which this run needs"):
        Output(tmp_path / "out", tmp_path / "model", tmp_path / "out" / "candidates")


def test_many_processes_look_at_the_lock_of_one_that_is_gone(tmp_path):
    partial = unfinished(tmp_path / "out")
    holder = subprocess.Popen([sys.executable, "-c", "pass"])
    holder.wait()
    import socket

    (partial / "run.lock").write_text(f"{holder.pid}\n{socket.gethostname()}\n")
    for _ in range(3):
        Output(tmp_path / "out", resume=True)
    assert (partial / "run.lock").is_file(), "looking changes nothing"
    (partial / "run.lock").write_text("1\nanother-machine\n")
    with pytest.raises(QuantkitError, match="process 1 on another-machine"):
        Output(tmp_path / "out", resume=True)
