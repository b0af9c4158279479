"""Runs that are stopped, and what checkpoints hold."""

import hashlib
import json

import pytest

from quantkit.io.run_folder import MANIFEST
from quantkit.run.pipeline import quantize_checkpoint


def digest(folder):
    """Hash of every file by its path inside, but the report, which holds times, and the list of the files' sizes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("quantkit_report.json", MANIFEST)
    }


class Stop(Exception):
    """What stops a run."""


def interrupted(folder, recipe, output, after, by=Stop):
    """Runs until `after` blocks are done, when `by` is raised."""

    def stop(done, _total, _name):
        if done == after:
            raise by

    with pytest.raises(by):
        quantize_checkpoint(folder, recipe, output, progress=stop)


def unseal(folder):
    """Takes the checksums out of a checkpoint's config.json, so that what it says can be changed."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].pop("checksums")
    path.write_text(json.dumps(config))
