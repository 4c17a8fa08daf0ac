"""Models by name (`config.model.name`)."""

from vlp.models.captioner import Captioner
from vlp.models.dual import Dual

MODELS = {"captioner": Captioner, "dual": Dual}
