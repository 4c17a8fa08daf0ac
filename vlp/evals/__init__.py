"""Evaluators by name (`config.evals.<label>.name`, the label itself by default)."""

from vlp.evals.captions import Captions
from vlp.evals.retrieval import Retrieval

EVALS = {"captions": Captions, "retrieval": Retrieval}
