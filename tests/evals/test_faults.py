"""What the trials of killed runs count, and what they take for a refusal."""

import json

from quantkit.evals.benchmarks.faults import End, Tally, table


def test_counts_are_json():
    row = Tally()
    row.add("quantize 0", "killed, same bytes", [])
    row.add("quantize 1", "killed, same bytes", ["other bytes", "no output"])
    (record,) = json.loads(json.dumps(table({"quantize": row})))
    assert (record["kind"], record["trials"], record["sound"]) == ("quantize", 2, 1)
    assert record["outcomes"] == {"killed, same bytes": 1, "fault": 1}
    assert record["faults"] == ["quantize 1: other bytes", "quantize 1: no output"]


def test_a_refusal_is_one_line_and_exit_code_2():
    said = "blocks  1/2  0:00:01\nerror: another run fills out.partial\n"
    assert End(2, said, 0.0, 1.0).refusal
    assert not End(1, said, 0.0, 1.0).refusal
    assert not End(None, said, 0.0, 1.0).refusal
    assert not End(2, said + "error: and another\n", 0.0, 1.0).refusal
    assert not End(2, "Traceback (most recent call last):\nerror: x\n", 0.0, 1.0).refusal
