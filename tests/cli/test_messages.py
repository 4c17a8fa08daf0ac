"""How mistakes on the command line are answered."""

import pytest

from helpers import runs


def answer(capsys, *argv):
    """The line on standard error; exit code 2."""
    assert runs.vlp(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "argv", [["train"], ["data", "verify"], ["nothing"], ["caption", "--workdir", "x", "none.jpg"]]
)
def test_the_name_of_the_program_is_said_once(argv, capsys):
    line = answer(capsys, *argv)
    assert line.startswith("vlp: ") and not line.startswith("vlp: vlp")


def test_a_misspelt_config_file(capsys):
    line = answer(capsys, "plan", "--config", "configs/coca_emojy.py:smoke")
    assert "did you mean 'configs/coca_emoji.py'?" in line
    assert "check the path" in answer(capsys, "plan", "--config", "nowhere/coca.py")


def test_a_folder_of_images(tmp_path, capsys):
    line = answer(capsys, "caption", "--workdir", tmp_path, tmp_path)
    assert f"got the folder {str(tmp_path)!r}" in line and "*.jpg" in line
