"""The table of what is recovered, in short: PV-Tuning before continuous parts alone before nothing, and so on."""

import pytest

from quantkit.evals.recovery import measure, parser


@pytest.fixture(scope="module")
def rows(reference):
    arguments = [str(reference), "--data", "stdlib", "--calibration", "stdlib", "--only", "pv", "low-rank", "--ranks"]
    arguments += ["2", "--num-samples", "16", "--tuning-samples", "80", "--steps", "16", "--batch", "2"]
    arguments += ["--micro-batch", "2", "--max-windows", "8"]
    return {row["label"]: row for row in measure(parser().parse_args(arguments))}


def test_codes_and_continuous_parts_together_recover_most(rows):
    start, continuous, both = (
        rows[name]["kl"] for name in ("GPTQ", "GPTQ, continuous, same tokens", "GPTQ, PV-Tuning")
    )
    assert both < continuous < start
    assert len({rows[name]["bits_per_weight"] for name in rows if "rank" not in name}) == 1


def test_the_exact_correction_recovers_more_than_others(rows):
    exact, diagonal, plain = (rows[f"GPTQ, rank 2, {metric}"] for metric in ("exact", "diagonal", "plain"))
    assert exact["kl"] < min(diagonal["kl"], plain["kl"], rows["GPTQ"]["kl"])
    assert exact["bits_per_weight"] > rows["GPTQ"]["bits_per_weight"]
