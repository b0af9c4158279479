"""Imports run strictly downward: a module may only import modules of a lower rank."""

import ast

import pytest

from .conftest import ROOT

RANKS = [
    ["kernels.bitpack", "kernels.tuning", "kernels.timing", "kernels.codebook_table", "kernels.trellis", "kernels.cpu"],
    ["kernels.tiles", "kernels.self_check", "kernels.int_group_layout"],
    [
        *["kernels.codebook_matmul_triton", "kernels.hadamard_triton", "kernels.int_group_matmul_triton"],
        *["kernels.pyramid_matmul_triton", "kernels.kv_attention_triton"],
        *["kernels.trellis_matmul_triton", "kernels.viterbi_triton", "kernels.viterbi_numba"],
        *["kernels.codebook_rule", "kernels.launching", "kernels.pyramid", "kernels.numba_words"],
    ],
    ["kernels.operators", "kernels.plans"],
    ["kernels.hadamard"],
    ["kernels.*", "constants", "errors", "linalg", "metrics", "corpus", "post_import"],
    ["kernels.self_check_cases"],
    ["registry", "device", "stats", "data", "search.settings", "tuning.settings"],
    ["weight"],
    ["protocols", "formats.*"],
    ["quantizers.grid", "quantizers.feedback", "quantizers.kmeans", "quantizers.target_shift"],
    ["quantizers.*"],
    ["linear", "model", "plan", "kvcache.config", "kvcache.codec"],
    ["kvcache.storage"],
    ["embedding", "forward", "fusion", "unpacking"],
    ["calibrate", "shards"],
    ["rotate"],
    ["checkpoint", "recipe", "report"],
    ["ranks"],
    ["tuning.tunable"],
    ["tuning.pv"],
    ["tuning.block"],
    ["registration"],
    ["hf", "kvcache.cache"],
    ["kvcache.attention"],
    ["kvcache.prefix"],
    ["tuning.adapters", "tuning.teacher"],
    ["tuning.end_to_end"],
    ["folder"],
    ["pipeline", "estimate"],
    ["search.evolve", "search.store", "search.budget", "search.memory"],
    ["search.baselines", "search.build"],
    ["search.spaces"],
    ["search.fitness"],
    ["search.session"],
    ["search.picture"],
    ["__init__"],
    ["evals.reference.recall", "evals.perplexity", "evals.decode", "evals.kernel_families", "evals.memory"],
    ["evals.absent_gpu", "evals.kernel_kinds", "evals.rate_distortion", "evals.suite_driver"],
    ["evals.kernel_build", "evals.suite_groups"],
    ["evals.kernel_peers", "evals.kv_speed", "evals.suite_models"],
    ["evals.suite_deep"],
    ["evals.suite_parts"],
    ["evals.suite_builds"],
    ["evals.gpu_suite"],
    ["evals.*"],
    ["cli.display", "cli.options"],
    [
        *["cli.bench", "cli.doctor", "cli.evaluate", "cli.generate", "cli.inspect", "cli.quantize", "cli.search"],
        *["cli.tune"],
    ],
    ["cli.main"],
    ["cli.__main__"],
    ["evals.packed_bytes"],
]
FOLDERS = ("quantkit", "kernels", "cli", "evals")


def modules():
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if any(parent.is_symlink() for parent in path.parents):
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[1:] if folder == "quantkit" else parts)
            if not name.endswith(".__init__"):
                yield name, path


def rank(name):
    exact = [level for level, names in enumerate(RANKS) if name in names]
    wild = [level for level, names in enumerate(RANKS) for n in names if n.endswith(".*") and name.startswith(n[:-1])]
    found = exact or wild
    assert found, f"{name} has no rank: give it one in RANKS"
    return found[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "quantkit":
            name = node.module.partition(".")[2]
            if name and all(len(list((ROOT / folder / name).glob("*.py"))) == 0 for folder in (".", "quantkit")):
                yield name
            else:  # a package: what is imported from it is a module
                yield from (f"{name}.{alias.name}" if name else "__init__" for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "quantkit":
                    yield alias.name.partition(".")[2] or "__init__"


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_run_downward(name, path):
    for other in imported(path):
        assert rank(other) < rank(name), f"{name} (rank {rank(name)}) imports {other} (rank {rank(other)})"


def test_kernels_import_nothing_else_of_quantkit():
    for name, path in modules():
        if name.startswith("kernels."):
            assert all(other.startswith("kernels.") for other in imported(path))


def test_kernels_folder_is_a_namespace():
    """An __init__.py there would shadow Hugging Face's package `kernels`, which transformers imports."""
    assert not list((ROOT / "kernels").rglob("__init__.py"))


def test_files_and_functions_stay_readable():
    for _, path in modules():
        source = path.read_text()
        assert source.count("\n") <= 500, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 120, f"{path}: {node.name}"
