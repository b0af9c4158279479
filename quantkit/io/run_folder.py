"""Folders that one run fills, and folders that appear whole.

`RunFolder` is a folder with a run in it: locked while a process fills it, marked with what the run is so that another
cannot continue it by mistake, and with a journal of what was written, so that nothing else is ever removed.

    FOLDER/run.lock       process and host that fill it now; void once that process is gone
    FOLDER/run.json       the identity of the run
    FOLDER/run.files      the journal: a line for each file, entered before it is written

`Output` is a folder that appears whole, by one rename: the run towards it works in `<output>.partial`, and what it
publishes lists its own files in quantkit_files.json, for whoever replaces it.

The lock is `filelock.SoftFileLock`: a file that only one can make, on a shared file system too. One that a process
killed on another machine has left cannot be told from one that is held, and has to be removed by hand.
"""

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import SoftFileLock, Timeout
from xxhash import xxh3_64

from quantkit.core.constants import RELEASE
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.io.files import (
    files_below,
    leads_below,
    read_json,
    read_record,
    record,
    remove_below,
    sync,
    write_durably,
)

MANIFEST = "quantkit_files.json"
"""Lists a published folder's files, itself left out, with their bytes, and its tensors and all other files with their
checksums."""
_IDENTITY, _JOURNAL, _LOCK = "run.json", "run.files", "run.lock"
_MADE, _REPLACED, _PUBLISHING, _WRITING = "checkpoint", "replaced", "publishing.json", "writing-"
_OF_SAFETENSORS = re.compile(r"\.tmp\w{6}")
"""Temporary files that safetensors makes beside those that it writes."""


class RunFolder:
    """A folder that one run fills, and that only the same run continues.

    Args:
        folder: made by `begin`; until then nothing is changed.
        what: is in it, for errors: "a database of candidates".

    Attributes:
        folder: the same, without symbolic links.
        identity: JSON that identifies the run, as far as it is recorded.

    Raises:
        QuantkitError: another process fills the folder, or something else is in it.
        CheckpointError: the record of its run is damaged.
    """

    anew: str = "remove the folder, or give another"
    """The way out where a run cannot be continued."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self._what = folder.expanduser().resolve(), what
        self._lock = SoftFileLock(self.folder / _LOCK, timeout=0)
        self._refuse()
        self.identity: dict[str, Any] = {}
        if self.has(_IDENTITY):
            self.identity = self.read_record(_IDENTITY, f"the identity of {what}; {self.anew}")
        self._written = self._journaled()

    def _refuse(self) -> None:
        """Raises QuantkitError where the folder is held, or holds something else than a run."""
        if self.folder.exists() and not self.folder.is_dir():
            raise QuantkitError(f"{self.folder} is a file; {self._what} is a folder")
        process, host = self._holder()
        here = host == socket.gethostname()
        if process and not (here and not psutil.pid_exists(process)):
            raise QuantkitError(self._held())
        own = {_IDENTITY, f"{_IDENTITY}.tmp", _JOURNAL, _LOCK}
        found = [] if self.has(_IDENTITY) else [name for name in files_below(self.folder) if name not in own]
        if found:
            raise QuantkitError(f"{self.folder} holds {_few(found)} and is not {self._what}; move that away")

    def _holder(self) -> tuple[int, str]:
        """(process, host) that hold the folder, the process 0 where none does; looks, and changes nothing."""
        with suppress(OSError, ValueError):
            process, host = self.path(_LOCK).read_text().split("\n")[:2]
            return int(process), host
        return 0, ""

    def _held(self) -> str:
        process, host = self._holder()
        if process == os.getpid() and host == socket.gethostname():
            return f"{self.folder} is used by this process already; give every purpose a folder of its own"
        return (
            f"{self.folder} is used by process {process} on {host}; wait for it. If no such process runs there any "
            f"more, remove {self.path(_LOCK)}"
        )

    @contextmanager
    def begin(self, identity: Mapping[str, Any]) -> Iterator["RunFolder"]:
        """Makes the folder where there is none and holds it for as long as the context lasts.

        Args:
            identity: JSON; a run that was begun with another one is not continued. What is in the folder is part of it.

        Raises:
            QuantkitError: another process holds it, another run was begun in it, or it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise QuantkitError(self._held()) from None
        except OSError as error:
            raise QuantkitError(f"{self.folder} cannot be written to ({error})") from error
        begun = True
        try:
            self._open()
            begun = self.has(_IDENTITY)
            if found := self.differing(identity):
                raise QuantkitError(self._other(found))
            self.identify({"run": self._what, **identity})
            yield self
        except BaseException:
            if not begun and not self._written:  # nothing was made that could be continued
                self.path(_IDENTITY).unlink(missing_ok=True)
            raise
        finally:
            self._lock.release()
            with suppress(OSError):
                self.folder.rmdir()  # where nothing is left in it

    def _open(self) -> None:
        """Removes what a write left behind that was killed."""
        self._written = self._journaled()
        remove_below(self.folder, [*(f"{name}.tmp" for name in self._written), *self._strays()])

    def differing(self, identity: Mapping[str, Any]) -> list[str]:
        """What of an identity was recorded otherwise, or not at all, in words; nothing where no run has begun."""
        if not self.has(_IDENTITY):
            return []
        given = json.loads(json.dumps({"run": self._what, **identity}))
        return _differences(given, {key: self.identity.get(key) for key in given})

    def _other(self, found: list[str]) -> str:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        return (
            f"{self.folder} was begun with other settings: {'; '.join(found[:3])}{more}. Repeat those, or {self.anew}"
        )

    def identify(self, identity: Mapping[str, Any]) -> None:
        """Records more of what identifies the run, or holds it against what is recorded.

        Raises:
            QuantkitError: something differs.
        """
        more = json.loads(json.dumps(identity))
        known = {key: value for key, value in more.items() if key in self.identity}
        if found := _differences(known, self.identity):
            raise QuantkitError(self._other(found))
        if more.keys() - self.identity.keys():
            self.identity |= more
            content = record(_IDENTITY, self.identity)
            write_durably(self.path(_IDENTITY), lambda target: target.write_bytes(content), len(content))

    def path(self, name: str) -> Path:
        """Where a file of the run is, given its name relative to the folder."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether a file of the run is there, and so whole."""
        return self.path(name).is_file()

    def write(self, name: str, write: Callable[[Path], Any], needed: int) -> None:
        """Writes a file of the run; see `write_durably`."""
        self._note([name])
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        write_durably(self.path(name), write, needed)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes a file of the run."""
        self.write(name, lambda target: target.write_bytes(content), len(content))

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file of the run."""
        self.write_bytes(name, (json.dumps(value, indent=2) + "\n").encode())

    def write_record(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a JSON object that the run will read again."""
        self.write_bytes(name, record(name, value))

    def read_record(self, name: str, what: str) -> dict[str, Any]:
        """What `write_record` wrote; see `io.files.read_record`."""
        return read_record(self.path(name), name, what)

    def _note(self, names: Iterable[str]) -> None:
        """Enters names into the journal; one with a slash at its end stands for a folder and all in it."""
        assert self._lock.is_locked, "who does not hold the folder does not write into it"
        new = sorted(set(names) - self._written)
        if new:
            with open(self.path(_JOURNAL), "a", encoding="utf-8") as journal:
                journal.write("".join(json.dumps(name) + "\n" for name in new))
                journal.flush()
                os.fsync(journal.fileno())
            self._written.update(new)

    def _journaled(self) -> set[str]:
        names: set[Any] = set()
        with suppress(OSError, UnicodeDecodeError):
            for line in self.path(_JOURNAL).read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, TypeError, RecursionError):  # the end of what a killed process has written
                    names.add(json.loads(line))
        return {name for name in names if leads_below(self.folder, name)}

    def own(self, name: str) -> Path:
        """A folder within this one that others fill for the run, and that goes with it."""
        self._note([f"{name}/"])
        return self.path(name)

    def foreign(self) -> list[str]:
        """Names of files in the folder that quantkit has not written."""
        own = {_IDENTITY, _JOURNAL, _LOCK, *self._written}
        own |= {f"{name}.tmp" for name in own} | set(self._strays())
        folders = tuple(name for name in own if name.endswith("/"))
        return [name for name in files_below(self.folder) if name not in own and not name.startswith(folders)]

    def _strays(self) -> list[str]:
        """Names of safetensors' own temporary files, in folders that the run writes into."""
        return [
            path.relative_to(self.folder).as_posix()
            for folder in {self.path(name).parent for name in (*self._written, _IDENTITY)}
            for path in folder.glob(".tmp*")
            if _OF_SAFETENSORS.fullmatch(path.name)
        ]

    def clear(self) -> None:
        """Removes what the run has written, and the folders that this empties."""
        for name in self._written:
            if name.endswith("/"):
                shutil.rmtree(self.path(name), ignore_errors=True)
        # What stands for work that is done goes first, and what says whose it is last: a kill leaves no half a block.
        first = sorted(self._written, key=lambda name: not name.endswith(".safetensors"))
        names = [*first, _IDENTITY, _JOURNAL]
        remove_below(self.folder, [*names, *(f"{name}.tmp" for name in names)])
        self._written, self.identity = set(), {}


class Output(RunFolder):
    """A folder that is made whole, or not at all.

    Args:
        output: the folder to make.
        sources: models and other folders that the run reads or fills, which must not be touched.
        resume: go on with an unfinished run towards it, if there is one.
        overwrite: discard an unfinished run, and replace `output` when done.

    Attributes:
        output: the folder to make, without symbolic links.

    Raises:
        QuantkitError: `output` names no new folder, exists, or holds what quantkit has not written; or a run towards it
            goes on, or is unfinished. Nothing was changed by then.
    """

    anew = "`overwrite` starts anew"

    def __init__(self, output: Path, *sources: Path, resume: bool = False, overwrite: bool = False) -> None:
        if not output.name or output.name == "..":
            raise QuantkitError(f"`output` {output} names no new folder; give one such as out/model-3bit")
        self.output = output.expanduser().resolve()
        above = next(parent for parent in self.output.parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise QuantkitError(f"`output` {output}: {above} is no folder that can be written to")
        self.anew = "`overwrite` without `resume` starts anew" if overwrite and resume else type(self).anew
        for source in (source.expanduser().resolve() for source in sources):
            if self.output == source or self.output in source.parents:
                raise QuantkitError(
                    f"`output` {output} would replace {source}, which this run needs; give another folder"
                )
        self._discard, self._replace = overwrite and not resume, overwrite
        try:
            super().__init__(self.output.with_name(f"{self.output.name}.partial"), "an unfinished run of quantkit")
        except CheckpointError:
            if not self._discard:
                raise
            self._written, self.identity = self._journaled(), {}
        self._check_replaced(resume)
        if foreign := self.foreign():
            raise QuantkitError(f"{self.folder} holds {_few(foreign)}, which quantkit has not written; move it away")
        if self.has(_IDENTITY) and not self._published and not (resume or overwrite):
            raise QuantkitError(
                f"{self.folder} holds an unfinished run; `resume` continues it, `overwrite` starts anew"
            )

    def differing(self, identity: Mapping[str, Any]) -> list[str]:
        """See `RunFolder`; another release of quantkit may pack otherwise."""
        return super().differing({"quantkit": RELEASE, **identity})

    def identify(self, identity: Mapping[str, Any]) -> None:
        """See `RunFolder`."""
        super().identify({"quantkit": RELEASE, **identity})

    @property
    def _published(self) -> bool:
        """Whether the run there was killed after its last step that matters."""
        return self.has(_PUBLISHING) and not self.path(_MADE).exists() and self.output.exists()

    def _check_replaced(self, resume: bool = False) -> None:
        """Raises QuantkitError where `output` may not be replaced."""
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return
        if not self._replace:
            if self.has(_IDENTITY) and not self._published:
                raise QuantkitError(
                    f"{self.output} already exists, and an unfinished run is to replace it; `resume` with `overwrite` "
                    "continues that run, `overwrite` alone discards it and starts anew"
                )
            done = ", and there is no unfinished run towards it" if resume else ""
            raise QuantkitError(
                f"{self.output} already exists{done}; give another `output`, or `overwrite` to replace it"
            )
        if not (self.output / MANIFEST).is_file():
            raise QuantkitError(
                f"{self.output} has no {MANIFEST}, as quantkit's runs write it, and `overwrite` replaces nothing else; "
                "remove it first"
            )
        if foreign := _unlike_manifest(self.output):
            raise QuantkitError(
                f"{self.output} holds {_few(foreign)}, which quantkit has not written, or not like that; move it away"
            )

    def _open(self) -> None:
        if self._published or self._discard:
            self._written = self._journaled()
            replaced = self.path(_REPLACED)
            if replaced.is_dir() and not self.output.exists():
                replaced.rename(self.output)  # a run was killed between the two renames of `publish`
            self._remove_replaced()
            self.clear()
        super()._open()
        self.path(_PUBLISHING).unlink(missing_ok=True)  # of a run that was killed before it could
        for name in self._written:
            if name.startswith(_WRITING):
                shutil.rmtree(self.path(name), ignore_errors=True)

    def foreign(self) -> list[str]:
        """See `RunFolder`; what is being replaced has a list of its own."""
        replaced = self.path(_REPLACED)
        found = [name for name in super().foreign() if not name.startswith(f"{_REPLACED}/")]
        return found + [f"{_REPLACED}/{name}" for name in (_unlike_manifest(replaced) if replaced.is_dir() else [])]

    def made(self, name: str) -> str:
        """The name, in this folder, of a file of the folder to come."""
        return f"{_MADE}/{name}"

    def discard(self, name: str) -> None:
        """Removes a file of the run, to make it anew."""
        self.path(name).unlink(missing_ok=True)

    def empty(self) -> None:
        """Removes what was written of the folder to come."""
        remove_below(self.folder, [name for name in self._written if name.startswith(f"{_MADE}/")])

    def take(self, write: Callable[[Path], Any]) -> None:
        """Lets another library `write` files of the folder to come, which it names itself, into an empty folder.

        Raises:
            QuantkitError: they cannot be written.
        """
        scratch = self.own(f"{_WRITING}{os.getpid()}")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir()
            write(scratch)
        except OSError as error:
            raise QuantkitError(f"{scratch} cannot be written ({error}); what was finished before is kept") from error
        for name in files_below(scratch):
            self.write(self.made(name), (scratch / name).replace, 0)
        shutil.rmtree(scratch)

    def publish(self, checksums: Mapping[str, str] | None = None) -> None:
        """Gives the finished folder its name; nothing of the run is left beside it.

        Args:
            checksums: of its tensors, by name; for its list of files.

        Raises:
            QuantkitError: files have come into it, or into what it replaces, that quantkit has not written.
        """
        if foreign := self.foreign():
            raise QuantkitError(
                f"{self.folder} holds {_few(foreign)}, which quantkit has not written; move it away and `resume`"
            )
        self._check_replaced()
        made = self.path(_MADE)
        files = {name: (made / name).stat().st_size for name in files_below(made) if name != MANIFEST}
        others = {name: _checksum(made / name) for name in files if not name.endswith(".safetensors")}
        self.write_json(self.made(MANIFEST), {"files": files, "others": others, "tensors": dict(checksums or {})})
        self.write_json(_PUBLISHING, {"output": self.output.name})
        replaced = self.path(_REPLACED)
        try:
            if self.output.exists():
                self.output.rename(replaced)
            made.rename(self.output)
            sync(self.output.parent)
        except OSError as error:
            if replaced.is_dir() and not self.output.exists():
                replaced.rename(self.output)
            raise QuantkitError(f"{made} is whole and cannot be renamed to {self.output} ({error})") from error
        self._written = {name for name in self._written if not name.startswith(f"{_MADE}/")}
        self._remove_replaced()
        self.clear()

    def _remove_replaced(self) -> None:
        replaced = self.path(_REPLACED)
        if replaced.is_dir():
            remove_below(replaced, [*_listed(replaced), MANIFEST])
            with suppress(OSError):
                replaced.rmdir()


def _unlike_manifest(folder: Path) -> list[str]:
    """Names of a published folder's files that are not as its run left them."""
    known = _listed(folder)
    return [
        name for name in files_below(folder)
        if name != MANIFEST and ((folder / name).is_symlink() or known.get(name) != (folder / name).stat().st_size)
    ]  # fmt: skip


def check_listed(folder: Path) -> dict[str, Any]:
    """Holds a published folder's files, those of tensors apart, against their checksums; what `MANIFEST` holds.

    Raises:
        CheckpointError: one differs or is missing, or the list is damaged.
    """
    manifest = read_json(folder / MANIFEST, "the checksums of a quantkit run (save_pretrained writes none)")
    others = manifest.get("others")
    if not isinstance(others, dict):
        raise CheckpointError(f"{folder / MANIFEST} lists no checksums of files; {folder.name} cannot be verified")
    for name, wanted in others.items():
        path = folder / name
        if not leads_below(folder, name) or not path.is_file() or _checksum(path) != wanted:
            raise CheckpointError(f"{path} is not as it was written, or is gone; fetch it anew")
    return manifest


def _checksum(path: Path) -> str:
    """xxh3 of a file; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            digest = xxh3_64()
            while piece := file.read(2**22):
                digest.update(piece)
            return str(digest.hexdigest())
    except OSError:
        return ""


def _listed(folder: Path) -> dict[str, Any]:
    """The files that a published folder lists; none where it was empty."""
    if not (folder / MANIFEST).is_file():
        return {}
    listed = read_json(folder / MANIFEST, "a list of files; remove the folder yourself").get("files")
    return (
        {name: size for name, size in listed.items() if leads_below(folder, name)} if isinstance(listed, dict) else {}
    )


def _differences(given: Mapping[str, Any], recorded: Mapping[str, Any], above: str = "") -> list[str]:
    """What differs between two identities, setting by setting."""
    found = []
    for key in sorted(given):
        now, then = given[key], recorded.get(key)
        if isinstance(now, dict) and isinstance(then, dict):
            found += _differences({name: now.get(name) for name in now.keys() | then.keys()}, then, f"{above}{key}.")
        elif now != then:
            found.append(f"{above}{key} is {_short(now)}, and was {_short(then)}")
    return found


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
