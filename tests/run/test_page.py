"""The report's page and the model card: whole, harmless whatever texts hold, and the same each time."""

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from quantkit.run.card import base_model, model_card, title
from quantkit.run.page import report_page
from quantkit.run.pictures import picture
from quantkit.run.report import Check, Continuation, LayerReport, Piece, Report, Samples, Tuning
from quantkit.run.samples import _pieces

HOSTILE = "<script>alert(1)</script>\" onload='x' &amp; ]]> --> \u202e \x00 \ud800 $x$"
VOID = {"meta", "br", "hr", "img", "link", "input"}


@pytest.fixture(autouse=True)
def _pictures(_shortcuts, monkeypatch):
    monkeypatch.setattr("quantkit.run.page.picture", picture)


def report(text="name", **changes):
    kinds = ("self_attn.q_proj", "mlp.down_proj")
    layers = [
        LayerReport(f"model.layers.{i}.{kind}", f"gptq({text})", text, 3.0 + i, 0.1 / (i + 1), 0.01, (0.2, 0.1))
        for i in range(2)
        for kind in kinds
    ]
    layers.append(LayerReport("lm_head", "rtn(6)", text, 6.0, 0.0, None))
    texts = ((Piece(text), Piece(text, (text, "\n"))), (Piece("\nplain"),))
    made = Report(
        text, tuple(layers), 3.25, 1000, 400, 800, 900, 7777.5, 8_888_888, 0,
        {"quantizers": {"a": text}, "calibration": {"source": text}}, (text,),
        Check(text, 2, 64, 126, 0.0125, 0.001, 0.9, 0.05, 10.0, 11.0, 6666.5),
        Samples(texts, (Continuation(text, "one", "other"), Continuation("p", text, text)), text),
        Tuning(text, 2, 64, (0, 5, 10), (0.5, 0.25, 0.375)),
    )  # fmt: skip
    return replace(made, **changes)


class Page(HTMLParser):
    """Reads a page, and holds it against what a page may have."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_nothing_that_is_named_becomes_markup():
    hostile, harmless = report_page(report(HOSTILE)), report_page(report("harmless"))
    page, expected = Page(hostile), Page(harmless)
    assert page.tags == expected.tags and "script" not in page.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in expected.attributes]
    assert "".join(page.text).count("<script>alert(1)</script>") >= 8
    hostile.encode()
    assert not any(hidden in hostile for hidden in ("\u202e", "\x00"))
    assert "\\u202e" in hostile and "\\ud800" in hostile


def test_it_needs_nothing_from_elsewhere():
    page = report_page(report())
    for name, value in Page(page).attributes:
        assert name not in ("src", "href") and not name.startswith("on"), (name, value)
        assert "http" not in str(value) or name.startswith("xmlns"), (name, value)
        assert name != "xlink:href" or value.startswith("#"), value
    assert "@import" not in page and "url(http" not in page


def test_it_says_what_was_measured_and_no_times():
    page = "".join(Page(report_page(report())).text)
    for told in (
        "3.250", "1000 B → 400 B", "2.50x smaller", "0.0125 ± 0.0010", "90.0%", "10.000 → 11.000", "q_proj",
        "All 5 layers", "2.00e-01 → 1.00e-01", "lm_head", "the full model says", "the same, to the last token",
        "No continuations: name.", "calibration", "0.50000 → 0.25000", "All 3 measurements", "beside name",
    ):  # fmt: skip
        assert told in page, told
    assert not any(figure in page for figure in ("7777", "6666", "8.48", "8,888")), "times and memory"
    plain = "".join(Page(report_page(report(check=None, samples=None, tuning=None, notes=()))).text)
    assert not any(f"{part} " in plain for part in ("Check on held-out", "Text before and", "held-out KL"))


def test_pictures_are_of_the_pages_colours_and_the_same_each_time():
    page = report_page(report())
    ids = [value for name, value in Page(page).attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 20
    assert {found.strip("#)") for found in re.findall(r"#(?:layers|tuning)-[\w.-]+", page)} <= set(ids)
    assert page.count("<svg") == 2 and page.count("currentColor") > 2 and "mlp.down_proj" in page
    assert page == report_page(report())
    assert "<metadata" not in page


def test_without_matplotlib_it_has_the_tables_and_says_how_to_get_pictures(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = report_page(report())
    assert "<svg" not in page and "pip install" in page and "All 5 layers" in page


class Bytes:
    """A tokenizer of UTF-8's bytes."""

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


def test_marked_tokens_are_whole_characters():
    text = "aé→b"
    tokens = torch.tensor(list(text.encode()))
    choices = torch.zeros(2, len(tokens) - 1, dtype=torch.int64) + 65
    choices[1, 1] = 66  # for the second byte of é
    pieces = list(_pieces(Bytes(), tokens, choices))
    assert [piece.text for piece in pieces] == list(text)
    assert [piece.choices for piece in pieces] == [None, ("A", "B"), None, None]


def test_pieces_of_the_reference_tokenizer_join_to_the_text(reference):
    tokenizer = AutoTokenizer.from_pretrained(reference)
    tokens = torch.tensor(tokenizer("def naïve(x): → return 'ü'")["input_ids"])
    pieces = _pieces(tokenizer, tokens, torch.zeros(2, len(tokens) - 1, dtype=torch.int64))
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(tokens)


ORIGINAL = "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\ntags: [x]\nbase_model: a/b\n---\n# Original\n"


def test_the_card_has_what_the_hub_reads():
    made = report("Owner/Name", tuning=None)
    card = ModelCard(model_card(made, {}, ORIGINAL))
    data = card.data.to_dict()
    assert data["base_model"] == "Owner/Name"
    assert data["license"] == "apache-2.0" and data["language"] == ["en", "de"]
    assert data["library_name"] == "quantkit" and data["pipeline_tag"] == "text-generation"
    assert {"quantkit", "quantized"} <= set(data["tags"]) and "x" not in data["tags"]
    assert "model-index" not in data, "nobody else has that text"
    assert card.text.index("Load this checkpoint with quantkit") < card.text.index("measured bits")
    assert "KL to the full model: 0.01250 ± 0.00100" in card.text and "quantkit_report.html" in card.text
    tuned = ModelCard(model_card(report("gone"), {}, str(card)))
    assert tuned.data.to_dict()["base_model"] == "Owner/Name", "which the packed model's card knows"
    assert "0.50000 → 0.25000" in tuned.text
    plain = model_card(report("./gone", check=None, tuning=None), {}, "")
    assert "KL" not in plain and "license" not in plain and "base_model" not in plain


@pytest.mark.parametrize("source", ["wikitext2", "stdlib"])
def test_figures_on_text_that_others_have_are_in_the_model_index(source):
    check = replace(report().check, source=source)
    (result,) = ModelCard(model_card(report(check=check), {}, "")).data.to_dict()["model-index"]
    (found,) = result["results"]
    values = {metric["type"]: metric["value"] for metric in found["metrics"]}
    assert values == {"perplexity": 11.0, "kl_divergence": 0.0125, "top1_agreement": 0.9}
    assert found["dataset"]["args"] == {"held_out_sequences": 2, "seqlen": 64}


@pytest.mark.parametrize(
    "original",
    ["no card", "---\n: {[\n---\n", "---\n- a\n- b\n---\n", "---\nlicense: {a: 1}\nlanguage: 7\n---\n", "---\n" * 3],
)
def test_a_strange_original_card_is_left_alone(original):
    data = ModelCard(model_card(report(), {}, original)).data.to_dict()
    assert "license" not in data and "language" not in data


def test_a_hostile_name_does_not_leave_its_line():
    card = ModelCard(model_card(report("x\n---\nlicense: mit\n<script>`[a](b)"), {}, ""))
    assert "license" not in card.data.to_dict() and "<script>" not in card.text


def test_the_base_model_is_an_id_or_nothing(tmp_path):
    here = str(tmp_path)
    known = {"_name_or_path": "Owner/Name"}
    for model, config, expected in (
        ("Owner/Name", {}, "Owner/Name"),
        ("gpt2", {}, "gpt2"),
        ("Owner/Name/file.gguf", {}, "Owner/Name"),
        (here, known, "Owner/Name"),
        (here, {"_name_or_path": "/home/me/model"}, None),
        (here, {"_name_or_path": here}, None),
        (here, {"_name_or_path": 7}, None),
        (here, {}, None),
        ("reference", {}, None),
        ("a\x00b", known, None),
    ):
        assert base_model(model, config) == expected, (model, config)
    assert title(here) == tmp_path.name, "where it lies is nobody's business"
    assert title("Owner/Name") == "Owner/Name"


def test_the_json_has_no_samples():
    told = report().to_json()
    json.dumps(told, allow_nan=False)
    assert told["check"]["kl"] == 0.0125 and "samples" not in told


def test_a_report_is_read_again_but_for_its_samples():
    made = report()
    assert Report.from_json(json.loads(json.dumps(made.to_json()))) == replace(made, samples=None)
    plain = replace(made, samples=None, check=None, tuning=None)
    assert Report.from_json(json.loads(json.dumps(plain.to_json()))) == plain
