"""What takes long in every run and what tests do not look at: tests do without, but for those that are about it."""

from importlib import import_module

SHORTCUTS = {
    "os.fsync": lambda _file: None,  # no machine stops in the middle of a test
    "quantkit.run.page.picture": lambda _report: "<svg></svg>",
    "quantkit.run.trial.LONG": 0.0,  # what a run would take is told from few numbers
    "quantkit.run.trial.WIDEST": 32,
}
"""Places -> what stands there instead."""


def take():
    """Takes them for the rest of this process."""
    for place, value in SHORTCUTS.items():
        module, _, name = place.rpartition(".")
        setattr(import_module(module), name, value)
