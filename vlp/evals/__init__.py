"""Evaluators by name (`config.evals.<label>.name`, the label itself by default)."""

from vlp.evals.captions import Captions
from vlp.evals.retrieval import Retrieval
from vlp.evals.zeroshot import Zeroshot

EVALS = {"captions": Captions, "retrieval": Retrieval, "zeroshot": Zeroshot}
