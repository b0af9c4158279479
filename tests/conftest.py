"""Fixtures: small untrained models of several architectures with a tokenizer, and the reference model."""

import logging
import os

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core, each with one thread, and what it starts too
    os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from .helpers.experts import EXPERTS
from .helpers.shortcuts import SHORTCUTS

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "evals" / "reference" / "model"
VOCABULARY = 2048

# Odd on purpose: widths that are no multiple of 128, one KV head, windows of 256 tokens.
_ODD = {
    "vocab_size": VOCABULARY,
    "hidden_size": 320,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
_SMALL = _ODD | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**_ODD),
    "llama_small": LlamaConfig(**_SMALL),
    "llama_even": LlamaConfig(**_ODD | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}),
    "gpt2_small": GPT2Config(vocab_size=VOCABULARY, n_embd=80, n_inner=136, n_layer=2, n_head=4, n_positions=256),
    "llama_tied": LlamaConfig(**_ODD, tie_word_embeddings=True),
    "llama_tied_small": LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_ODD, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=320, n_inner=704, n_layer=2, n_head=5, n_positions=256),
    "neox": GPTNeoXConfig(**{k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}),
    "gemma4": Gemma4TextConfig(  # whose last two layers have no keys and values of their own
        **_SMALL | {"num_hidden_layers": 4, "num_key_value_heads": 2},
        head_dim=16,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=32,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCABULARY,
    ),
} | EXPERTS


WHOLE = ("test_extending.py", "test_lazy.py", "test_packaging.py", "test_readme.py")
"""Files beside the folders that run whole programs."""
KERNEL, SLOW = {"kernels"}, {"cli", "evals", "tuning", "evopress", *WHOLE}
"""Folders and files whose tests are marked so, for an edit loop: pytest -m "not slow and not kernel"."""
FIRST = ("evals", "kernels", "tuning", "cli", "evopress", "test_methods.py", *WHOLE)
"""Where files take longest: begun first, so that the processes that share a run end together."""


def pytest_collection_modifyitems(items):
    def folder(item):
        return item.path.relative_to(ROOT / "tests").parts[0]

    for item in items:
        if folder(item) in KERNEL:
            item.add_marker("kernel")
        if folder(item) in SLOW:
            item.add_marker("slow")
    items.sort(key=lambda item: FIRST.index(folder(item)) if folder(item) in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def _log_level():
    """A command that runs in the tests' process sets how much quantkit's log says."""
    level = logging.getLogger("quantkit").level
    yield
    logging.getLogger("quantkit").setLevel(level)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _shortcuts(monkeypatch):
    for place, value in SHORTCUTS.items():
        monkeypatch.setattr(place, value)


@pytest.fixture(scope="session")
def reference() -> Path:
    return REFERENCE


@pytest.fixture(scope="session")
def short_reference(tmp_path_factory, tokenizer) -> Path:
    """The reference model's first two blocks of six, with its head: what runs through all of it takes a third."""
    folder = tmp_path_factory.mktemp("models") / "short"
    AutoModelForCausalLM.from_pretrained(REFERENCE, num_hidden_layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(REFERENCE)


@pytest.fixture(scope="session")
def texts():
    """A few hundred kilobytes of real text."""
    from quantkit.run.corpus import standard_library

    documents = standard_library("train")
    return documents[: len(documents) // 8]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory, texts) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n\n".join(texts[:40]))
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """A function: architecture -> folder with an untrained model in bf16, made once a session."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16).save_pretrained(folder)
            PreTrainedTokenizerFast(
                tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>"
            ).save_pretrained(folder)
        return folder

    return make
