"""A search over a model: its figures are the model's, it resumes exactly, and what it makes is a checkpoint."""

import dataclasses
import json
import time

import pytest
import torch

import quantkit
from quantkit import GPTQ, RTN, Calibration
from quantkit.core import spec
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.core.metrics import token_kl
from quantkit.evopress.assemble import assemble
from quantkit.evopress.budget import Budget
from quantkit.evopress.build import build
from quantkit.evopress.settings import Evolution
from quantkit.evopress.spaces import BlockSpace, CandidateSpace
from quantkit.evopress.store import candidate_key
from quantkit.io.run_folder import Output, RunFolder
from quantkit.models.experts import take_apart
from quantkit.models.linear import QuantizedLinear
from quantkit.models.plan import tied
from quantkit.quantizers.target_shift import unshifted
from quantkit.run.recipe import Recipe, read_plan

from .conftest import CANDIDATES, LAYERS, SHORT, TEXT, make_session


@pytest.fixture(scope="module")
def budget(session, database):
    return Budget(3.0, "bits").units(database.source, session.space.names)


def test_levels_are_sorted_and_what_is_dominated_is_left_out(session):
    assert all(len(costs) == 3 for costs in session.space.index.costs), "RTN is as large as GPTQ, and worse"
    assert all(a > b > c for a, b, c in session.space.losses)


def test_fitness_is_the_models_kl(session, half):
    """Full vocabulary kept, so that the cache loses next to nothing; the model runs in mixed precision."""
    assignment = tuple(item % 3 for item in range(LAYERS))
    (found,) = session.fitness.on([assignment], torch.arange(4))
    teacher = quantkit.load(half, dtype=torch.float32).eval()
    session.space.apply(assignment)
    windows = session.fitness.sequences[:4]
    with torch.no_grad():
        wanted = token_kl(teacher(windows).logits, session.space.model(windows).logits).mean()
    assert found == pytest.approx(float(wanted), rel=0.03)


def test_figures_do_not_depend_on_what_was_measured_before(session):
    low, high = (0,) * LAYERS, (2,) * LAYERS
    first = session.fitness([low, high], 512, 3)
    again = [session.fitness([a], 512, 3)[0] for a in (high, low)]
    assert first == again[::-1]
    assert first[0] > first[1]
    assert session.fitness([low], 512, 4) != session.fitness([low], 512, 3)


def test_figures_do_not_depend_on_the_room_for_unpacked_weights(session, monkeypatch):
    wanted = session.fitness([(0,) * LAYERS, (2,) * LAYERS, (1,) * LAYERS], 512, 3)
    monkeypatch.setattr(session.space, "_budget", 400_000)
    others = [tuple(int(item == place) for item in range(LAYERS)) for place in (0, 10, LAYERS - 1)]
    session.fitness(others, 256, 1)
    assert session.fitness([(0,) * LAYERS, (2,) * LAYERS, (1,) * LAYERS], 512, 3) == wanted
    assert len(session.space._linears) == LAYERS


def test_sensitivities_tell_layers_apart(session):
    found = session.sensitivities()
    assert all(levels[0] >= levels[1] >= levels[2] >= 0 for levels in found)
    assert max(levels[0] for levels in found) > 2 * min(levels[0] for levels in found)


def test_a_search_keeps_its_budget_and_is_no_worse_than_its_starts(session, budget):
    states = []
    outcome = session.search(budget, progress=states.append)
    assert len(outcome.history) == len(states) == 3
    assert outcome.spent <= budget and all(line.cost <= budget for line in outcome.history)
    assert outcome.spent > 0.999 * budget
    assert set(outcome.starts) | {"search"} == set(outcome.held_out)
    assert all(session.space.index.cost(start) <= budget for start in outcome.starts.values())
    assert outcome.held_out["search"] < outcome.held_out["uniform"]


def test_an_interrupted_search_ends_in_the_same_assignment(session, budget, tmp_path, monkeypatch):
    whole = session.search(budget)

    def stop(now):
        if len(now.history) == 2:
            raise KeyboardInterrupt

    def search(*arguments):
        folder = RunFolder(tmp_path / "search", "a search")
        with folder.begin({}):
            return session.search(arguments[0], folder, *arguments[1:])

    with pytest.raises(KeyboardInterrupt):
        search(budget, stop)
    rest = []
    again = search(budget, rest.append)
    assert len(rest) == 1
    assert again == whole
    longer = dataclasses.replace(session.settings, evolution=dataclasses.replace(SHORT.evolution, generations=4))
    with monkeypatch.context() as patched:
        patched.setattr(session, "settings", longer)
        assert search(budget).history[:3] == whole.history
    with pytest.raises(QuantkitError, match="other settings: budget is"):
        search(budget - 1)
    path = tmp_path / "search" / "search.json"
    state = json.loads(path.read_text())
    state["state"]["parent"][0] ^= 1
    for text in ("{}", json.dumps(state)):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="cannot be read as a search's state; remove it"):
            search(budget)


def assembled(folder, database, chosen, settings=None, files=None):
    """The report of a checkpoint of candidates."""
    output = Output(folder)
    with output.begin({}):
        return assemble(
            database, chosen, output, name="model", settings=settings or {}, files=lambda report: files or {},
            device=torch.device("cpu"), start=time.monotonic(),
        )  # fmt: skip


def loaded_as_measured(folder, session, outcome):
    """(the checkpoint's model, tokens) on which it gives what the search's own model gives."""
    loaded = quantkit.load(folder, dtype=torch.float32).eval()
    session.space.apply(outcome.assignment)
    for linear in session.space.model.modules():
        if hasattr(linear, "release"):
            linear.release()
    tokens = session.fitness.sequences[:1, :40]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, session.space.model(tokens).logits, rtol=1e-4, atol=1e-4)
    return loaded, tokens


def test_the_checkpoint_is_the_model_that_was_measured(session, database, half, budget, tmp_path):
    outcome = session.search(budget)
    chosen = session.space.chosen(outcome.assignment)
    texts = {quantizer: spec.write(quantizer) for quantizer in database.quantizers.values()}
    plan = {"layers": {layer: texts[database.quantizers[key]] for layer, key in chosen.items()}}
    report = assembled(
        tmp_path / "found", database, chosen, settings={"budget": budget},
        files={"quantkit_plan.json": json.dumps(plan).encode()},
    )  # fmt: skip
    assert report.bits_per_weight <= 3.0
    assert report.bits_per_weight == pytest.approx(8 * outcome.spent / report.packed_weights)
    loaded, tokens = loaded_as_measured(tmp_path / "found", session, outcome)
    with torch.no_grad():
        assert loaded.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 44)
    rules = read_plan(tmp_path / "found" / "quantkit_plan.json")
    assert list(Recipe(None, rules).plan(quantkit.load(half))) == list(chosen)
    again = Recipe(None, {**rules, "*.mlp.*": None}).plan(quantkit.load(half))
    assert len(again) == 12


def test_a_size_counts_every_byte_of_the_files(session, database, half, tmp_path):
    source, names = database.source, session.space.names
    asked = int(0.45 * source.nbytes())
    allowed = Budget(asked, "bytes").units(source, names)
    outcome = session.search(allowed)
    assembled(tmp_path / "found", database, session.space.chosen(outcome.assignment))
    size = sum(path.stat().st_size for path in (tmp_path / "found").glob("*.safetensors"))
    assert 0.98 * asked < size <= asked


@pytest.fixture(scope="module")
def with_ends(half, recipe, database, place):
    """The same candidates, with head and embedding at 6 bits beside them."""
    return build(half, dataclasses.replace(recipe, head_bits=6), CANDIDATES, place, device="cpu")


def test_head_and_embedding_are_packed_beside_the_candidates(with_ends, database, half, place, tmp_path):
    """They leave candidates alone, are measured, counted and stored, and a plan makes them again."""
    assert with_ends.blocks == database.blocks and with_ends.store.identity == database.store.identity
    assert list(with_ends.fixed) == ["model.embed_tokens", "lm_head"] and not database.fixed
    session, source = make_session(half, with_ends, place, start="uniform"), with_ends.source
    asked = int(0.25 * source.nbytes())
    budget = Budget(asked, "bytes")
    allowed = budget.units(source, session.space.names, with_ends.fixed)
    assert allowed > budget.units(source, session.space.names) + 1_000_000
    assert budget.check(source, session.space.names, CANDIDATES, with_ends.fixed) == ""
    outcome = session.search(allowed)
    report = assembled(tmp_path / "found", with_ends, session.space.chosen(outcome.assignment))
    size = sum(path.stat().st_size for path in (tmp_path / "found").glob("*.safetensors"))
    assert 0.97 * asked < size <= asked
    rows = {row.name: row for row in report.layers}
    assert rows["lm_head"].bits_per_weight == rows["model.embed_tokens"].bits_per_weight == 6.125
    assert "gptq" in rows["lm_head"].quantizer and "rtn" in rows["model.embed_tokens"].quantizer
    loaded_as_measured(tmp_path / "found", session, outcome)
    rules = {name: unshifted(quantizer) for name, quantizer in with_ends.fixed.items()}
    planned = Recipe(None, rules).plan(quantkit.load(half))
    assert planned == with_ends.fixed


def test_a_tied_head_is_one_weight_in_a_search_too(model_folder, tmp_path):
    folder = model_folder("llama_tied_small")
    recipe = Recipe(GPTQ(3, 32), calibration=Calibration("stdlib", 4, 64), head_bits=6)
    made = build(folder, recipe, (GPTQ(4, 32),), tmp_path / "c", device="cpu")
    assert tied(made.fixed) == {"model.embed_tokens": "lm_head"}
    chosen = dict.fromkeys(made.blocks, candidate_key(GPTQ(4, 32)))
    report = assembled(tmp_path / "found", made, chosen)
    loaded = quantkit.load(tmp_path / "found", dtype=torch.float32).eval()
    assert loaded.get_input_embeddings().head is loaded.lm_head and loaded.lm_head.packed.bits == 6
    space = CandidateSpace(quantkit.load(folder, dtype=torch.float32), torch.float32, made)
    space.apply(tuple(len(costs) - 1 for costs in space.index.costs))
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, space.model(tokens).logits, rtol=1e-4, atol=1e-4)
    units = Budget(1_000_000, "bytes").units(made.source, [*made.blocks], made.fixed)
    packed = sum(made.store.candidates(made.blocks[name], key)[name].nbytes for name, key in chosen.items())
    others = 1_000_000 - units - loaded.lm_head.packed.nbytes
    assert report.bytes_after - packed - loaded.lm_head.packed.nbytes < others < 40_000, "norms and headers"
    words = {name: unshifted(made.fixed["lm_head"]) for name in made.fixed}
    assert Recipe(None, words).plan(quantkit.load(folder)) == made.fixed
    searched = dataclasses.replace(recipe, rules={"lm_head": GPTQ(3, 32)})
    assert not build(folder, searched, (GPTQ(4, 32),), tmp_path / "with-head", device="cpu").fixed
    named = Recipe(RTN(3, 32), {"model.embed_tokens": RTN(3, 32)}, calibration=recipe.calibration)
    with pytest.raises(QuantkitError, match="is an embedding, and candidates are for linear layers"):
        build(folder, named, (RTN(4, 32),), tmp_path / "no", device="cpu")


@pytest.mark.parametrize("each_expert", [False, True])
def test_a_block_s_experts_are_one_choice_or_many(each_expert, model_folder, tmp_path):
    folder = model_folder("mixtral")
    recipe = Recipe(GPTQ(2, 32), calibration=Calibration("stdlib", 4, 64))
    made = build(folder, recipe, (GPTQ(4, 32),), tmp_path / "c", device="cpu")
    model = quantkit.load(folder, dtype=torch.float32)
    take_apart(model)
    space = CandidateSpace(model, torch.float32, made, each_expert=each_expert)
    assert len(space.names) == (8 + 16 if each_expert else 8 + 4)
    assert each_expert or "model.layers.0.mlp.experts.*.down_proj" in space.names
    level = [0] * len(space.names)
    level[4] = 1  # the first experts' first layers
    space.apply(level)
    bits = {name: module.packed.bits for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    wide = sorted(name for name, count in bits.items() if count == 4)
    assert len(bits) == 24 and len(wide) == (1 if each_expert else 4) and all("gate_up_proj" in name for name in wide)
    costs = space.index.costs[4]
    own = [made.store.candidates(0, candidate_key(GPTQ(b, 32)))[wide[0]].nbytes for b in (2, 4)]
    assert costs == tuple(len(wide) * nbytes for nbytes in own)
    assert space.chosen(level)[wide[0]] == candidate_key(GPTQ(4, 32))


def test_impossible_budgets_say_what_is_possible(session):
    least = session.space.index.cost((0,) * LAYERS)
    with pytest.raises(QuantkitError, match=f"the least is {least:,}"):
        session.search(least - 1)


def test_perplexity_is_a_measure_too(half, database, place, budget):
    session = make_session(half, database, place, measure="perplexity", start="uniform")
    low, high = session.fitness([(0,) * LAYERS, (2,) * LAYERS], 512, 0)
    assert 1 < high < low
    assert set(session.search(budget).held_out) == {"uniform", "search"}


def test_blocks_are_left_out(reference, tmp_path):
    settings = dataclasses.replace(SHORT, evolution=Evolution(2, 4, ((1, 512),)))
    session = quantkit.evopress.session.Session(reference, BlockSpace, tmp_path, TEXT, settings, torch.device("cpu"))
    outcome = session.search(4)
    assert sum(outcome.assignment) == 4
    figures = session.fitness([(1,) * 6, outcome.assignment, (0, 0, 1, 1, 1, 1)], 512, 0)
    assert figures[0] == pytest.approx(0, abs=2e-3) and figures[1] < figures[2]
    session.space.apply(outcome.assignment)
    tokens = session.fitness.sequences[:1, :40]
    with torch.no_grad():
        wanted = session.space.model(tokens, use_cache=False).logits
        pruned = session.space.pruned(outcome.assignment)
        assert pruned.config.num_hidden_layers == 4
        pruned.save_pretrained(tmp_path / "pruned")
        loaded = quantkit.load(tmp_path / "pruned", dtype=torch.float32).eval()
        torch.testing.assert_close(loaded(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
        assert loaded.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 44)
