"""Messages of errors that a user can act on."""

import pytest

from vlp.core import check


def test_one_line_that_says_where_what_and_what_to_do():
    error = check.error("config.batch", 7, "a multiple of 8", "change it")
    assert isinstance(error, ValueError)
    assert str(error) == "config.batch: got 7, expected a multiple of 8; change it"


@pytest.mark.parametrize(
    "got, hint",
    [("sigilp", "did you mean 'siglip'?"), ("zzz", "use one of them"), ("CLIP", "use one of them")],
)
def test_unknown_names_list_the_known_ones(got, hint):
    error = check.unknown("objective.name", got, ["siglip", "clip"])
    assert str(error) == f"objective.name: got {got!r}, expected one of ['clip', 'siglip']; {hint}"
