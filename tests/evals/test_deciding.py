"""The table that decides: rows are known again, done once, kept, and fail alone."""

import json
import signal
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from quantkit.core import spec
from quantkit.core.errors import CalibrationError, QuantkitError, UnknownName
from quantkit.evals import deciding, deciding_row
from quantkit.evals.deciding import Runner, picked, run
from quantkit.evals.deciding_records import Records, Setting, setting_of
from quantkit.evals.deciding_row import Task, measure
from quantkit.evals.deciding_rows import SETS, EndToEnd, Protocol, Quantized, Row, Searched
from quantkit.evals.deciding_table import draw, markdown, table_of
from quantkit.evals.peers import DENSE, PACKED, PeerGrid, PeerRun
from quantkit.io.source import load_tokenizer

SETTING = Setting({"model": "m", "fingerprint": "f", "calibration": "c", "test": "t", "test_tokens": "0", "seed": 0})
THREE = tuple(Row("rtn", "RTN", bits, Quantized(f"rtn({bits})"), True) for bits in (2, 3, 4))
FIGURES = {
    "kl": 0.5, "kl_se": 0.01, "perplexity": 20.0, "top1_agreement": 0.9, "flip_rate": 0.1, "bits_per_weight": 2.25,
    "bits_model": 5.0, "dense_layers": 0, "seconds": 1.0, "peak_bytes": 2**30,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("\n\n".join(texts)[:40_000])
    return path


@pytest.fixture
def protocol(text):
    return Protocol(str(text), str(text), num_samples=4, seqlen=32, test_sequences=2, test_seqlen=48)


class Fake:
    """A runner that gives `answers`, and notes what it was asked for."""

    def __init__(self, **answers):
        self.answers, self.asked = answers, []

    def can(self, row):
        return not isinstance(row.way, PeerGrid)

    def measure(self, row):
        self.asked.append(row.name)
        found = self.answers.get(row.name.replace("-", "_"), FIGURES)
        if isinstance(found, BaseException):
            raise found
        return found


@pytest.mark.parametrize("rows", SETS.values(), ids=SETS)
def test_rows_are_declared_once(rows):
    assert len({row.name for row in rows}) == len({SETTING.id_of(row) for row in rows}) == len(rows)
    for row in rows:
        assert " " not in row.name and json.loads(json.dumps(row.settings)) == json.loads(json.dumps(row.settings))
        if isinstance(row.way, Quantized):
            spec.read(row.way.method)
            assert not row.way.low_rank_bits or "low_rank(" in row.way.method
        if isinstance(row.way, Searched):
            assert spec.read(row.way.base) in spec.read_several(row.way.candidates)


def test_a_row_is_known_by_what_it_is_made_of():
    row = THREE[0]
    known = SETTING.id_of(row)
    assert SETTING.id_of(replace(row, method="x", label="X", drawn=False)) == known, "names are no settings"
    assert Setting({**SETTING.values, "model": "n", "test": "u", "calibration": "v"}).id_of(row) == known
    others = [SETTING.id_of(replace(row, way=replace(row.way, target_shift=0.1)))]
    others += [Setting({**SETTING.values, name: 1}).id_of(row) for name in ("fingerprint", "test_tokens", "seed")]
    others += [SETTING.id_of(replace(row, way=replace(row.way, tuning=EndToEnd(steps=n)))) for n in (1, 2)]
    others += [SETTING.id_of(replace(row, way=replace(row.way, sequences=(8, 64))))]
    grid = PeerGrid("auto-round", 2, 64)
    others += [SETTING.id_of(replace(row, way=way)) for way in (grid, replace(grid, symmetric=False))]
    assert len({known, *others}) == len(others) + 1


def test_a_setting_is_that_of_model_text_and_protocol(model_folder, protocol, text, tmp_path):
    folder = model_folder("llama_small")
    found = setting_of("m", folder, protocol).values
    assert (found["num_samples"], found["seqlen"], found["test_sequences"]) == (4, 32, 2)
    assert found["calibration"] == "text.txt", "no places of this machine"
    assert setting_of("m", folder, protocol).values == found
    other = tmp_path / "text.txt"
    other.write_text(f"{text.read_text()} and more")
    for changed, names in (
        (replace(protocol, seed=1), {"seed"}),
        (replace(protocol, num_samples=3), {"num_samples", "calibration_tokens"}),
        (replace(protocol, calibration=str(other)), {"calibration_text"}),
        (replace(protocol, test_sequences=1), {"test_sequences", "test_tokens"}),
    ):
        values = setting_of("m", folder, changed).values
        assert names <= {name for name in found if values[name] != found[name]}, names
        assert values["fingerprint"] == found["fingerprint"]
    assert setting_of("m", model_folder("llama_tied_small"), protocol).values["fingerprint"] != found["fingerprint"]


def test_a_stopped_run_goes_on(tmp_path, capsys):
    path = tmp_path / "deep" / "rows.json"
    first = Fake(rtn_3=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(THREE, first, Records(path, SETTING, THREE))
    assert first.asked == ["rtn-2", "rtn-3"]
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["rtn-2"]
    second = Fake()
    records = Records(path, SETTING, THREE)
    run(THREE, second, records)
    assert second.asked == ["rtn-3", "rtn-4"]
    run(THREE, third := Fake(), Records(path, SETTING, THREE))
    assert third.asked == []
    run(THREE[:1], third, records, again=True)
    assert third.asked == ["rtn-2"]
    assert markdown(records.current()).count("\n") == 4
    assert "[1/2] rtn-3 KL x 1000 500.00 +- 10.00 at 2.250 bits" in capsys.readouterr().out


def test_a_row_that_fails_leaves_the_others(tmp_path, capsys):
    records = Records(tmp_path / "rows.json", SETTING, THREE)
    run(THREE, Fake(rtn_3={"error": "no such grid"}), records)
    assert [records.get(row)["state"] for row in THREE] == ["done", "failed", "done"]
    assert "rtn-3 failed: no such grid" in capsys.readouterr().out
    assert records.get(THREE[1])["error"] == "no such grid" and markdown(records.current()).count("| RTN |") == 2
    run(THREE, fake := Fake(), records)
    assert fake.asked == []
    run(THREE, fake, records, retry=True)
    assert fake.asked == ["rtn-3"] and "error" not in records.get(THREE[1])


def test_other_settings_are_other_rows_and_stay(tmp_path):
    path = tmp_path / "rows.json"
    run(THREE, Fake(), Records(path, SETTING, THREE))
    changed = (replace(THREE[0], way=replace(THREE[0].way, target_shift=0.1)), *THREE[1:])
    run(changed, fake := Fake(), records := Records(path, SETTING, changed))
    assert fake.asked == ["rtn-2"]
    found = json.loads(path.read_text())
    assert [(row["name"], row["current"]) for row in found["rows"]] == [
        ("rtn-2", True), ("rtn-3", True), ("rtn-4", True), ("rtn-2", False)
    ]  # fmt: skip
    assert table_of(found) == markdown(records.current())
    assert table_of(found).splitlines()[2:] == [
        f"| {bits} | RTN | 2.250 | 5.000 | 500.0 +- 10.0 | 20.00 | 90.0 | 10.0 | 1 | 1.00 |" for bits in (2, 3, 4)
    ]


def test_two_commands_fill_one_file(tmp_path):
    path = tmp_path / "rows.json"
    one, two = (Records(path, SETTING, THREE) for _ in range(2))
    run(THREE[:2], Fake(), one)
    run(THREE, fake := Fake(), two)
    assert fake.asked == ["rtn-4"], "it has seen that the others are done by now"
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["rtn-2", "rtn-3", "rtn-4"]
    path.write_text('{"other": 1}')
    with pytest.raises(QuantkitError, match=r"rows\.json is no file of this table"):
        Records(path, SETTING, THREE)


def test_the_source_is_that_of_the_methods():
    found = {"/".join(path.parts[-2:]) for path in deciding.sources()}
    assert {"quantkit/api.py", "quantizers/gptq.py", "kernels/viterbi.py", "parts/base.py"} <= found
    assert not any(name.startswith(("evals/", "cli/")) for name in found)


def test_rows_are_picked_by_patterns():
    assert picked(THREE, ["all"]) == list(THREE) and picked(THREE, ["*-4", "rtn-2"]) == [THREE[0], THREE[2]]
    with pytest.raises(UnknownName, match="unknown row 'gptq"):
        picked(THREE, ["rtn-2", "gptq-*"])


def test_bits_are_those_of_the_files(short_reference, protocol, tmp_path):
    way = Quantized("rtn(3, group_size=64)", head_bits=8)
    found = measure(Task(way, short_reference, protocol, tmp_path))
    model = AutoModelForCausalLM.from_pretrained(short_reference)
    size = 0
    for file in (tmp_path / "packed").glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            size += sum(t.numel() * t.element_size() for t in map(stored.get_tensor, stored.keys()))
    assert found["bytes"] == size and found["bits_model"] == 8 * size / model.num_parameters()
    ends = 2 * model.config.vocab_size * model.config.hidden_size
    inside = found["packed_weights"] - ends
    assert found["bits_per_weight"] == pytest.approx((inside * 3.25 + ends * (8 + 16 / 128)) / (inside + ends))
    assert found["kl"] > 0 and found["windows"] == 2 and found["dense_layers"] == 0 and found["peak_bytes"] > 2**27


@pytest.mark.parametrize(
    "way",
    [
        Quantized("low_rank(gptq(2, group_size=32), 1)", low_rank_bits=0.5),
        Quantized("gptq(3, group_size=32)", tuning=EndToEnd(2, 2, 8, 4, 1)),
        Searched(3, "rtn(2, group_size=32), rtn(4, group_size=32)", "rtn(2, group_size=32)", 2, 2, ((1, 64),), 6, 2),
    ],
    ids=["corrections", "tuned", "searched"],
)
def test_ways_of_quantkit(way, model_folder, protocol, tmp_path):
    found = measure(Task(way, model_folder("llama_small"), replace(protocol, seqlen=64), tmp_path))
    assert found["kl"] > 0 and found["seconds"] > 0 and json.dumps(found)
    if isinstance(way, Searched):
        assert 2 < found["bits_per_weight"] <= 3 and found["plan"]
    elif way.tuning:
        assert len(found["tuning"]) == 3 and found["seconds_of"]["tune"] > 0
        assert found["seconds"] >= sum(found["seconds_of"].values())


def test_first_tokens_left_out_of_statistics(model_folder, protocol, tmp_path):
    folder, found = model_folder("llama_small"), {}
    for count in (0, 4, 32):
        (tmp_path / str(count)).mkdir()
        task = Task(Quantized("gptq(2, group_size=32)", left_out=count), folder, protocol, tmp_path / str(count))
        if count == 32:  # all of a sequence: not a token is counted
            with pytest.raises(CalibrationError):
                measure(task)
        else:
            found[count] = measure(task)["kl"]
    assert found[0] != found[4]


def test_a_peer_s_row(model_folder, protocol, tmp_path, monkeypatch):
    folder = model_folder("llama_small")

    def peer(python, grid, model, sequences, work):
        assert (python, sequences.shape) == ("PEER", (4, 32))
        load_tokenizer(model).save_pretrained(work / DENSE)
        made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        made.model.layers[0].mlp.up_proj.weight.data.zero_()
        made.save_pretrained(work / DENSE)
        state = {name: tensor.contiguous() for name, tensor in made.state_dict().items() if "layers." not in name}
        for name, module in made.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                state[f"{name}.qweight"] = torch.zeros(module.weight.numel() // 8, dtype=torch.int32)
        (work / PACKED).mkdir()
        save_file(state, work / PACKED / "model.safetensors")
        return PeerRun(9.0, 11, {"peer": "1"})

    monkeypatch.setattr(deciding_row, "quantize_by_peer", peer)
    found = measure(Task(PeerGrid("auto-round", 4, 32), folder, protocol, tmp_path, "PEER"))
    assert (found["seconds"], found["peak_bytes"], found["peer_versions"]) == (9.0, 11, {"peer": "1"})
    assert found["bits_per_weight"] == 4 and found["kl"] > 0


def test_a_row_has_a_process_of_its_own(model_folder, protocol, tmp_path):
    runner = Runner(model_folder("llama_small"), protocol, {}, 1, tmp_path)
    found = runner.measure(Row("rtn", "RTN", 4, Quantized("rtn(4, group_size=32)")))
    assert found["bits_per_weight"] == 4.5 and found["threads"] == 1 and found["versions"]["quantkit"]
    assert found["peak_bytes"] > 2**27 and list(tmp_path.iterdir()) == []


def test_what_a_method_refuses_is_a_failed_row(model_folder, protocol, tmp_path):
    task = Task(Quantized("gptq(3, group_size=512)"), model_folder("llama_small"), protocol, tmp_path)
    error = deciding_row.answer(lambda: measure(task))["error"]
    assert error.startswith("GPTQ(bits=3, group_size=512") and "\n" not in error


def test_a_process_that_is_killed_is_a_failed_row(model_folder, protocol, tmp_path, monkeypatch, capfd):
    runner = Runner(model_folder("llama_small"), protocol, {}, 1, tmp_path)
    row = Row("rtn", "RTN", 3, Quantized("rtn(3)"))
    for script, error in (
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL"),
        ("raise SystemExit('no memory')", "ended by exit code 1: no memory"),
    ):
        ours = Runner._run
        monkeypatch.setattr(Runner, "_run", lambda s, _c, log, t=script, o=ours: o(s, [sys.executable, "-c", t], log))
        assert runner.measure(row) == {"error": error}
        monkeypatch.undo()


def running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_row_ends_with_the_command(tmp_path, protocol):
    """Ctrl-C, or a signal, ends the row's process and what that has started."""
    script = (
        f"import subprocess, time; child = subprocess.Popen(['sleep', '60']).pid\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child)); time.sleep(60)"
    )

    def interrupt(*_):
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 2)
        with pytest.raises(KeyboardInterrupt):
            Runner(tmp_path, protocol, {}, 1)._run([sys.executable, "-c", script], tmp_path / "log")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20  # a busy machine takes its time to end what was killed
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(child)


def test_errors_of_other_libraries_are_one_line(capsys):
    def fails():
        raise ValueError("a\nb")

    assert deciding_row.answer(fails) == {"error": "ValueError: a"} and "Traceback" in capsys.readouterr().err


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["deciding", *map(str, arguments)])
    deciding.main()


def test_the_command(model_folder, text, tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.json"
    asked = [model_folder("llama_small"), "--output", output, "--num-samples", 2, "--seqlen", 32]
    asked += ["--test-sequences", 2, "--test-seqlen", 32]
    with pytest.raises(SystemExit, match=r"no text: give `--data`, a folder with valid\.txt, or `--calibration`"):
        call(monkeypatch, *asked)
    for name in ("valid.txt", "test.txt"):
        (tmp_path / name).write_text(text.read_text())
    asked += ["--data", tmp_path]
    with pytest.raises(SystemExit, match="unknown row 'nothing'"):
        call(monkeypatch, *asked, "--rows", "nothing")
    call(monkeypatch, *asked, "--list")
    assert capsys.readouterr().out.splitlines()[0] == "missing rtn-g64-2"
    monkeypatch.setattr(Runner, "measure", lambda runner, row: FIGURES)
    call(monkeypatch, *asked, "--rows", "rtn-g64-*", "auto-round-g64-2", "--png", tmp_path / "kl.png")
    printed = capsys.readouterr().out
    assert "1 rows of peers are left out" in printed and printed.count("| RTN, groups of 64 |") == 3
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")
    call(monkeypatch, *asked, "--list", "--rows", "rtn-g64-?")
    assert capsys.readouterr().out.count("done    rtn-g64-") == 3
    monkeypatch.setattr(deciding, "source_hash", lambda: "another")
    call(monkeypatch, *asked, "--list", "--rows", "rtn-g64-2")
    assert "(by another state of the source)" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text() and found["setting"]["calibration"] == "valid.txt"

    def stop(runner, row):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "measure", stop)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, *asked, "--rows", "gptq-g64-2")
    assert ended.value.code == 130 and "stopped; what is done is kept" in capsys.readouterr().err


def test_a_picture_of_nothing(tmp_path):
    draw([], tmp_path / "none.png")
    assert (tmp_path / "none.png").stat().st_size > 1000
