"""Messages of UserErrors."""

import errno

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


@pytest.mark.parametrize("error, code", [
    (check.error("x", 1, 2, "y"), 2),
    (check.Failed("x: got a\nb"), 1),
    (OSError(errno.ENOSPC, "No space left", "f"), 1),
    (PermissionError(errno.EACCES, "Permission denied", b"f"), 1),
    (OSError(errno.EBADF, "Bad file descriptor"), None),
    (KeyError("x"), None),
])  # fmt: skip
def test_an_answer_is_one_line_and_a_code(error, code):
    told = check.answer(error)
    assert (told and told[1]) == code
    assert told is None or "\n" not in told[0]


def test_of_several_errors_the_first_failure_is_told():
    def closing():
        try:
            raise check.Failed("disk full")
        finally:
            raise KeyError("closed twice")

    with pytest.raises(KeyError) as e:
        closing()
    assert check.answer(e.value) == ("disk full", 1)


def test_a_script_ends_with_one_line_for_a_full_disk(capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left", "rows.json")

    with pytest.raises(SystemExit) as end:
        check.run(main)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("rows.json: got No space left, expected to read")
