"""How much is said, and what a command that is stopped says."""

from contextlib import contextmanager

from quantkit.cli import evaluate as evaluate_verb

from .conftest import run


def test_quiet_says_the_result_alone(model_folder, tmp_path):
    output = tmp_path / "out"
    arguments = ["quantize", model_folder("llama"), "--method", "rtn", "--output", output]
    quiet = run(*arguments, "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, f"{output}\n", "")
    assert "blocks  2/2" in run(*arguments, "--overwrite").stderr
    said = run(*arguments, "--overwrite", "-v").stderr
    assert "model.layers.1.mlp.down_proj: int_group, 3." in said
    assert len([line for line in said.splitlines() if "bits a weight, error" in line]) == 14


def test_eval_that_is_stopped_prints_what_it_measured(monkeypatch, complaint, model_folder, text_file, capsys):
    @contextmanager
    def stopping():
        def progress(done, total):
            if done == 2:
                raise KeyboardInterrupt

        yield progress

    monkeypatch.setattr(evaluate_verb, "window_progress", stopping)
    code, said = complaint("eval", model_folder("llama"), "--data", text_file, "--seqlen", 64, "--json")
    assert code == 130
    assert "stopped; the figures are of the first 2 sequences" in said
