"""Models by name (`config.model.name`)."""

from vlp.models.captioner import Captioner
from vlp.models.dual import Dual
from vlp.models.mammut import Mammut

MODELS = {"captioner": Captioner, "dual": Dual, "mammut": Mammut}
