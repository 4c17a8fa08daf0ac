"""Frozen features: few-shot ridge, linear probe, k-NN.

    vlp eval --workdir RUN --evals configs/evals/features.py:path=DATA,label=label

DATA has a split with labels for training (train) and another one to classify (test). With path left out, the run's own.

Arguments: path, label, train, split, batch, features (pooled: before the projection, as big_vision; embed).
"""

import ml_collections

from vlp.core.config import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(
        arg, path="", label="label", train="train", split="test", batch=64, features="pooled"
    )
    common = dict(label=arg.label, train_split=arg.train, split=arg.split, batch=arg.batch)
    common |= dict(features=arg.features, data=dict(path=arg.path))
    return ml_collections.ConfigDict(
        dict(
            fewshot=dict(common, shots=(1, 5, 10, 25), seeds=3),
            linear_probe=dict(common, max_per_class=1000),
            knn=dict(common, k=20, max_per_class=1000),
        )
    )
