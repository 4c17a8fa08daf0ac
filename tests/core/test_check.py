"""Messages of UserErrors."""

import pytest

from vlp.core import check


def test_one_line_that_says_where_what_and_what_to_do():
    error = check.error("config.batch", 7, "a multiple of 8", "write 8")
    assert isinstance(error, ValueError)
    assert str(error) == "config.batch: got 7, expected a multiple of 8; write 8"


@pytest.mark.parametrize(
    "got, hint",
    [("sigilp", "did you mean 'siglip'?"), ("zzz", "use one of them"), ("CLIP", "use one of them")],
)
def test_unknown_names_list_the_known_ones(got, hint):
    error = check.unknown("objective.name", got, ["siglip", "clip"])
    assert str(error) == f"objective.name: got {got!r}, expected one of ['clip', 'siglip']; {hint}"


def test_a_script_ends_with_one_line(capsys):
    def main():
        raise check.error("--batch", 7, "a multiple of 8", "write 8")

    with pytest.raises(SystemExit) as end:
        check.run(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "--batch: got 7, expected a multiple of 8; write 8\n"
    with pytest.raises(SystemExit) as end:
        check.run(lambda: 76)
    assert end.value.code == 76


def test_output_files_are_checked_before_work(tmp_path):
    check.output_file("--json", "")
    check.output_file("--json", tmp_path / "rows.json")
    with pytest.raises(check.UserError, match="^--json: got the directory"):
        check.output_file("--json", str(tmp_path))
    with pytest.raises(check.UserError, match="^--json: got .*, expected a file in an existing"):
        check.output_file("--json", str(tmp_path / "none" / "rows.json"))


def test_counts_below_one_are_refused():
    check.counts({"batch": [1, 2], "chunk": 0, "name": "x", "time": False, "mask": [0.0]}, "chunk")
    with pytest.raises(check.UserError, match="^--batch: got 0, expected 1 or more"):
        check.counts({"batch": [1, 0]})
    with pytest.raises(check.UserError, match="^--text-len: got -1, expected 0 or more"):
        check.counts({"text_len": -1}, "text_len")
