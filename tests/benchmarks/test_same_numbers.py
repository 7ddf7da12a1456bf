"""What counts as a difference between two records of numbers."""

from benchmarks.same_numbers import compare


def test_equal_records_have_no_difference() -> None:
    assert compare({"a": [0.1, 0.2], "b": "x"}, {"b": "x", "a": [0.1, 0.2]}) == []


def test_the_last_bit_and_a_missing_entry_are_differences() -> None:
    before = {"a": [0.1], "b": "x", "gone": 1}
    after = {"a": [0.1 + 2**-56], "b": "x", "new": 2}
    assert compare(before, after) == [
        "a: [0.1] -> [0.10000000000000002]",
        "gone: 1 -> None",
        "new: None -> 2",
    ]
