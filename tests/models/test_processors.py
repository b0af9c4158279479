"""Models that see, by way of their own processors: pictures and text go into the packed folder as into the full one.

Those whose processors do without torchvision, which is no package of the tests.
"""

import copy

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
)

import quantkit
from quantkit import Calibration
from quantkit.io.classes import class_of

from ..helpers.vision import SEEING

SIDE = 28


def llava(tokenizer):
    pixels = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(pixels, tokenizer, 14, "default", num_additional_image_tokens=1)


def gemma3(tokenizer):
    return Gemma3Processor(Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer, image_seq_length=4)


def idefics3(tokenizer):
    edge = {"longest_edge": SIDE}
    pixels = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    return Idefics3Processor(pixels, tokenizer, image_seq_len=1)


MARK = "<image>"
PROCESSORS = {
    "llava": (llava, {"image_token": MARK}, MARK),
    "gemma3": (
        gemma3, {"image_token": MARK, "boi_token": "<image begins>", "eoi_token": "<image ends>"}, "<image begins>"
    ),
    "idefics3": (
        idefics3, {
            "image_token": MARK, "fake_image_token": "<around>", "global_image_token": "<whole>", "end": "<end>"
        }, MARK,
    ),
}  # fmt: skip
"""What makes each family's processor, its tokenizer's tokens, and what stands for a picture in a prompt."""


@pytest.fixture
def with_processor(tmp_path, tokenizer):
    def make(family):
        folder = tmp_path / family
        make_processor, tokens, _ = PROCESSORS[family]
        tokenizer.save_pretrained(folder)
        try:
            processor = make_processor(AutoTokenizer.from_pretrained(folder, extra_special_tokens=tokens))
        except ImportError as error:  # Idefics 3's, up to transformers 5.17
            if "Torchvision" not in str(error):
                raise
            pytest.skip("this version of transformers makes the processor by torchvision alone")
        config = copy.deepcopy(SEEING[family].config)
        config.text_config.vocab_size = len(processor.tokenizer)
        config.image_token_id = processor.tokenizer.convert_tokens_to_ids(MARK)
        torch.manual_seed(0)
        model = class_of(config)._from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return make


def picture(turned=False):
    image = Image.radial_gradient("L").resize((60, 50)).convert("RGB")
    return Image.eval(image, lambda value: 255 - value) if turned else image


@pytest.mark.parametrize("family", PROCESSORS)
def test_pictures_go_in_by_the_packed_folders_own_processor(family, with_processor, text_file, tmp_path):
    folder = with_processor(family)
    text = Calibration(str(text_file), 2, 64)
    quantkit.quantize(folder, output=tmp_path / "packed", method="gptq", group_size=32, calibration=text)
    prompt = f"What is this {PROCESSORS[family][2]} then?"
    before, after = (AutoProcessor.from_pretrained(place) for place in (folder, tmp_path / "packed"))
    inputs = after(images=picture(), text=prompt, return_tensors="pt")
    for name, tensor in before(images=picture(), text=prompt, return_tensors="pt").items():
        assert torch.equal(tensor, inputs[name]), name

    packed = quantkit.load(tmp_path / "packed", dtype=torch.float32).eval()
    other = after(images=picture(turned=True), text=prompt, return_tensors="pt")
    with torch.no_grad():
        found = packed(**inputs).logits
        assert not torch.equal(found, packed(**other).logits), "it sees"
        said = packed.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert said.shape[1] == inputs["input_ids"].shape[1] + 4
        packed.dequantize(torch.float32)
        torch.testing.assert_close(packed(**inputs).logits, found, rtol=1e-5, atol=1e-5)
