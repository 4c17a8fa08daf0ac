"""What `vlp train` prints about its model: the plan, and the name of a file that lists all parameters."""

import jax

from helpers import runs
from vlp.train import session


def test_the_columns_of_the_table_fit_their_numbers():
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, "float32")
    params = {"text": {"kernel": shape(24, 1024, 3, 16, 64)}, "scale": shape()}
    assert session.parameters(params).splitlines() == [
        "parameter    shape                    type           size  mesh axes",
        "scale        a number                 float32           1",
        "text/kernel  24 × 1024 × 3 × 16 × 64  float32  75,497,472",
    ]


def test_parameters_are_in_a_file(toy, tmp_path, caplog):
    """The terminal shows the sizes by part, and the name of the file with every parameter."""
    caplog.set_level("INFO")
    run = tmp_path / "run"
    assert runs.train(runs.changed(runs.TOY, steps=1), run) == 0
    told = "\n".join(r.getMessage() for r in caplog.records)
    assert "stage stage0: 8 samples" in told and "total" in told
    assert str(run / "parameters.txt") in told and "\ncolour" not in told
    lines = (run / "parameters.txt").read_text().splitlines()
    assert lines[0].split() == ["parameter", "shape", "type", "size", "mesh", "axes"]
    assert [line.split()[0] for line in lines[1:]] == ["colour", "words"]
