"""Packed models to export, each made once a session."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)
from xxhash import xxh3_64_hexdigest

import quantkit

from ..helpers.exports import TEXT


@pytest.fixture(scope="session")
def packed(short_reference, tmp_path_factory):
    """A function: settings of `quantkit.quantize` -> a packed folder, made once a session."""
    root = tmp_path_factory.mktemp("packed")

    def make(bits, source=short_reference, **settings):
        folder = root / "-".join(map(str, (source.name, bits, *settings.items())))
        if not folder.exists():
            quantkit.quantize(source, output=folder, bits=bits, **{"method": "rtn", "group_size": 64} | settings)
        return folder

    return make


@pytest.fixture(scope="session")
def of_sentences(texts):
    """A tokenizer as Llama 2, Mistral and Phi 3 have it: no words, spaces that are letters, bytes for the rest."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = Metaspace()
    trained.train_from_iterator([*texts[:20], TEXT], BpeTrainer(vocab_size=900, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: number for number, token in enumerate([*first, *learned["vocab"]])}
    vocabulary |= {"<|endoftext|>": len(vocabulary)}
    merges = [tuple(pair) for pair in learned["merges"]]
    made = Tokenizer(BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    made.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    more = ["<|endoftext|>"]
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, add_bos_token=True, additional_special_tokens=more)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory, tokenizer, of_sentences):
    """A function: (name, config) -> folder with an untrained model whose norms and biases are not all alike."""
    root = tmp_path_factory.mktemp("sources")

    def make(name, config, dtype=torch.bfloat16):
        folder = root / f"{name}-{xxh3_64_hexdigest(f'{config.to_json_string()}{dtype}'.encode())[:8]}"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        (of_sentences if config.model_type in ("mistral", "phi3") else tokenizer).save_pretrained(folder)
        return folder

    return make
