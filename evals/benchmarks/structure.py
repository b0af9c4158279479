"""The shape of the source tree: what imports what, how deep, and how many lines each folder has.

    python -m quantkit.evals.benchmarks.structure

A folder is a layer: `LAYERS` has them from the lowest up, and a module imports from its own folder and from lower ones
alone. The depth of a module is that of its longest chain of imports; what functions import when they are called, and
what type checkers alone see, is not counted there, and still has to point downward.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("quantkit", "kernels", "cli", "evals")
LAYERS = [
    ["kernels"],
    ["core"],
    ["formats"],
    ["quantizers"],
    ["models"],
    ["io"],
    ["run"],
    ["tuning", "kvcache", "exchange"],
    ["serve"],
    ["evopress"],
    ["advice"],
    ["api"],
    ["evals"],
    [""],
    ["cli"],
    ["evals.benchmarks"],
]
"""Folders of the library, lowest first; "" is `quantkit` itself. Of one line none imports another."""


@dataclass(frozen=True)
class Module:
    """A source file.

    Attributes:
        name: below `quantkit`, such as "core.weight"; "" for the package itself.
        path: of the file.
        imported: names of the modules of quantkit that it imports, anywhere in it.
        at_import: those of them that it imports when it is imported itself.
    """

    name: str
    path: Path
    imported: frozenset[str] = field(default_factory=frozenset)
    at_import: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def layer(self) -> int:
        """The index of its line of LAYERS.

        Raises:
            ValueError: its folder has none.
        """
        for folder in (self.name.rpartition(".")[0], self.name.split(".")[0]):
            for level, folders in enumerate(LAYERS):
                if folder in folders and (folder or not self.name):
                    return level
        raise ValueError(f"{self.path}: no line of LAYERS has its folder")


def modules(root: Path = ROOT) -> dict[str, Module]:
    """All modules of the library by name."""
    paths = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                parts = path.relative_to(root).with_suffix("").parts
                name = ".".join(parts[1:] if folder == "quantkit" else parts)
                paths[name.removesuffix("__init__").removesuffix(".")] = path
    return {name: _read(name, path, paths) for name, path in paths.items()}


def _read(name: str, path: Path, paths: dict[str, Path]) -> Module:
    tree = ast.parse(path.read_text())
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    found = {(other, id(node) not in later) for node in ast.walk(tree) for other in _named(node, paths)} - {
        (name, True)
    }
    return Module(name, path, frozenset(o for o, _ in found), frozenset(o for o, early in found if early))


def _named(node: ast.AST, paths: dict[str, Path]) -> Iterator[str]:
    """The modules of quantkit that an import statement names; a package's own name where it takes something from it."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == "quantkit":
                yield alias.name.partition(".")[2]
    elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "quantkit":
        package = node.module.partition(".")[2]
        for alias in node.names:
            inner = f"{package}.{alias.name}".removeprefix(".")
            yield inner if inner in paths else package


def upward(found: dict[str, Module]) -> list[str]:
    """Imports that point to a higher layer or to the other folder of a line."""
    wrong = []
    for module in found.values():
        for name in sorted(module.imported):
            other = found[name]
            beside = other.layer == module.layer and _folder(module) != _folder(other) and name and module.name
            if other.layer > module.layer or beside:
                wrong.append(f"{module.name or 'quantkit'} imports {name or 'quantkit'}")
    return wrong


def _folder(module: Module) -> str:
    return module.name.split(".")[0]


def depths(found: dict[str, Module]) -> dict[str, list[str]]:
    """Each module's longest chain of imports, itself first.

    Raises:
        ValueError: some import one another in a circle; the message names them.
    """
    chains: dict[str, list[str]] = {}

    def chain(name: str, path: tuple[str, ...]) -> list[str]:
        """The longest chain from a module down; `path` is the way that led there."""
        if name in path:
            raise ValueError(f"a circle of imports: {' -> '.join([*path[path.index(name) :], name])}")
        if name not in chains:
            below = [chain(other, (*path, name)) for other in sorted(found[name].at_import)]
            chains[name] = [name, *max(below, key=len, default=[])]
        return chains[name]

    for name in found:
        chain(name, ())
    return chains


def main() -> None:
    """The command."""
    found = modules()
    lines, files = Counter[str](), Counter[str]()
    for module in found.values():
        folder = next(f for f in LAYERS[module.layer] if f in (module.name.rpartition(".")[0], _folder(module)))
        lines[folder] += module.path.read_text().count("\n")
        files[folder] += 1
    print(f"{'folder':18} {'files':>5} {'lines':>6}")
    for folder in (folder for line in LAYERS for folder in line):
        print(f"{folder or 'quantkit':18} {files[folder]:5} {lines[folder]:6}")
    apart = ("kernels", "cli", "evals", "evals.benchmarks")
    print(f"{'the library':18} {'':5} {sum(count for folder, count in lines.items() if folder not in apart):6}")
    wrong = upward(found)
    try:
        chains = depths(found)
    except ValueError as error:
        sys.exit(str(error))
    library = {name: chain for name, chain in chains.items() if _folder(found[name]) not in ("cli", "evals")}
    print("circles of imports: 0")
    for title, some in (("library", library), ("all", chains)):
        longest = max(some.values(), key=len)
        print(f"depth of imports, {title}: {len(longest)}   {' > '.join(name or 'quantkit' for name in longest)}")
    for line in wrong:
        print(line)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
