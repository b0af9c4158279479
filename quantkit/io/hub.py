"""A finished checkpoint on the Hugging Face hub: checked for before the work, uploaded after it."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.core.constants import RELEASE
from quantkit.core.errors import CheckpointError, QuantkitError, first_line
from quantkit.io.checkpoint import is_packed, read_config


def hub_id(name: str) -> str:
    """A repository's id as it was given.

    Raises:
        QuantkitError: it is none that the hub could have.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise QuantkitError(f"{name!r} is no id of a repository on the hub, such as OWNER/NAME ({error})") from error
    return name


def check_push(name: str) -> str:
    """Asks the hub who is logged in, before there is anything to upload.

    Args:
        name: OWNER/NAME, or NAME for a repository of one's own.

    Returns:
        OWNER/NAME.

    Raises:
        QuantkitError: it is no id, nobody is logged in, the token can only read, or the hub does not answer.
    """
    from huggingface_hub import whoami

    name = hub_id(name)
    with _asking(f"the hub does not say who would upload to {name}"):
        who = whoami()
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise QuantkitError(
            f"the hub's token here can only read, and {name} is to be written; `hf auth login` takes one that can write"
        )
    return name if "/" in name else f"{who['name']}/{name}"


def push_to_hub(folder: str | Path, name: str, private: bool = False) -> str:
    """Uploads a packed checkpoint, its card and its report with it, to a repository that is made where there is none.

    Args:
        folder: of the checkpoint.
        name: OWNER/NAME, or NAME for a repository of one's own.
        private: whether a new repository is; one that exists stays as it is.

    Returns:
        The repository's address.

    Raises:
        CheckpointError: the folder holds no packed checkpoint.
        QuantkitError: see `check_push`; or the upload failed, and the message has the command that repeats it.
    """
    from huggingface_hub import create_repo, upload_folder

    folder = Path(folder).expanduser()
    if not is_packed(read_config(folder)):
        raise CheckpointError(f"{folder} is not a quantkit checkpoint; `quantkit quantize` makes one")
    name = check_push(name)
    again = f"hf upload {shlex.quote(name)} {shlex.quote(str(folder))} .{' --private' if private else ''}"
    with _asking(f"{folder} is whole and was not uploaded; `{again}` does it by hand"):
        address = create_repo(name, private=private or None, exist_ok=True)
        upload_folder(repo_id=name, folder_path=folder, commit_message=f"Packed by quantkit {RELEASE}")
    return str(address)


@contextmanager
def _asking(otherwise: str) -> Iterator[None]:
    """Turns what the hub's client raises into one line that begins with `otherwise`."""
    try:
        yield
    except Exception as error:  # huggingface_hub raises its own, httpx's and OS errors
        reason = first_line(error)
        if type(error).__name__ == "LocalTokenNotFoundError":
            reason = "nobody is logged in; `hf auth login` does that"
        raise QuantkitError(f"{otherwise} ({reason})") from error
