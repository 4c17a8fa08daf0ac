"""What may change between two starts of a run."""

from vlp.runtime import restart


def test_paths_of_parts_and_streams_are_free():
    def config(path):
        data = {"path": path, "workers": len(path), "mixture": [{"name": "a", "path": path}]}
        own = {"data": data, "streams": {"more": {"batch": 8, "data": data}}}
        return own | {"stages": [own, {"streams": None, "data": {"mixture": None}}]}

    assert restart.fixed(config("a")) == restart.fixed(config("bb"))
    left = restart.fixed(config("a"))
    assert left["streams"] == {"more": {"batch": 8, "data": {"mixture": [{"name": "a"}]}}}
    assert config("a")["data"]["path"] == "a"
