"""Data for pretraining: numpy only, random access, an order that only samples seen decide.

sources/ and records/ read records; order.py says which record stands where; leaves.py makes a batch's arrays from a
record; dataset.py and pipeline.py make batches; tools/ is what `vlp data` runs.

`dataset.open_dataset(config.Data(...))` opens data; `SOURCES` lists what it can read.
"""

from vlp.data import sources, toy_shapes

# name in config.data.source → function from the config section to a `records.Source`
SOURCES = {"records": sources.open_data, "shapes": toy_shapes.open_data}
