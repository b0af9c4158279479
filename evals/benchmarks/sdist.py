"""The source distribution as the checkout is: `quantkit/{kernels,cli,evals}` stay symbolic links.

setuptools follows links, which would leave two copies of those folders in the archive. pyproject.toml names this
command, and setuptools reads this file alone, so it imports nothing of quantkit.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from setuptools.command.sdist import sdist


class Sdist(sdist):
    """`sdist` that keeps links to folders inside the package."""

    def make_release_tree(self, base_dir: str, files: Iterable[str]) -> None:
        """Copies all files but those behind the links, then makes the links."""
        links = [path for path in sorted(Path("quantkit").iterdir()) if path.is_symlink()]
        kept = [name for name in files if not any(link in Path(name).parents for link in links)]
        super().make_release_tree(base_dir, kept)
        for link in links:
            (Path(base_dir) / link).symlink_to(os.readlink(link))
