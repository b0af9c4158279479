"""The table of what is recovered, in short: PV-Tuning before continuous parts alone before nothing."""

from quantkit.evals.recovery import measure, parser


def test_codes_and_continuous_parts_together_recover_most(short_reference):
    arguments = [str(short_reference), "--data", "stdlib", "--calibration", "stdlib", "--method", "rtn", "--only", "pv"]
    arguments += ["--seqlen", "128", "--tuning-samples", "140", "--steps", "36", "--batch", "4", "--code-lr", "0.12"]
    rows = {row["label"]: row for row in measure(parser().parse_args([*arguments, "--max-windows", "16"]))}
    names = ("RTN, PV-Tuning", "RTN, continuous, same tokens", "RTN")
    both, continuous, start = (rows[name]["kl"] for name in names)
    assert both < continuous < start
    assert "RTN, straight-through, same tokens" in rows
    assert len({row["bits_per_weight"] for row in rows.values()}) == 1
