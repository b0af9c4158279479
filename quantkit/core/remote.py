"""Whether code that lies beside a model may be run; nothing else decides it, and nothing implies it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

REMOTE: ContextVar[bool] = ContextVar("trust_remote_code", default=False)
"""Whether it may, in what runs now."""


@contextmanager
def trust_remote_code() -> Iterator[None]:
    """While it lasts, models that need code of their own are loaded with it: it comes with them, and may do anything.

    with quantkit.trust_remote_code():
        quantkit.quantize("owner/model", output="packed")
    """
    token = REMOTE.set(True)
    try:
        yield
    finally:
        REMOTE.reset(token)
