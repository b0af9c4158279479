"""Whether there is a hub to ask."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch
from urllib.parse import urlsplit


def named() -> bool:
    """Whether the hub's address means anything here: a proxy is set, or its host's name is known."""
    from huggingface_hub import constants

    if any(name.lower() in ("https_proxy", "http_proxy", "all_proxy") and value for name, value in os.environ.items()):
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


@contextmanager
def offline_unless_named() -> Iterator[bool]:
    """Datasets come from the cache alone where there is no hub: its client would try again for 20 seconds.

    Yields:
        Whether there is one; see `named`.
    """
    import datasets
    from huggingface_hub import constants

    if named():
        yield True
        return
    with patch.object(constants, "HF_HUB_OFFLINE", True), patch.object(datasets.config, "HF_HUB_OFFLINE", True):
        yield False
