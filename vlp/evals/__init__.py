"""Evaluators by name (`config.evals.<label>.name`, the label itself by default)."""

from vlp.evals.captions import Captions
from vlp.evals.geometry import Geometry
from vlp.evals.pairs import Pairs
from vlp.evals.probes import FewShot, Knn, LinearProbe
from vlp.evals.retrieval import Retrieval
from vlp.evals.video import Video
from vlp.evals.zeroshot import Zeroshot

EVALS = {
    "captions": Captions,
    "fewshot": FewShot,
    "geometry": Geometry,
    "knn": Knn,
    "linear_probe": LinearProbe,
    "pairs": Pairs,
    "retrieval": Retrieval,
    "video": Video,
    "zeroshot": Zeroshot,
}
