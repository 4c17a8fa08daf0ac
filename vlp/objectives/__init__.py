"""Training methods by name (`config.objective.name`); one file each."""

from vlp.objectives.albef import Albef
from vlp.objectives.cap import Cap
from vlp.objectives.clip import Clip
from vlp.objectives.coca import Coca
from vlp.objectives.mammut import Mammut
from vlp.objectives.siglip import Siglip

OBJECTIVES = {
    "albef": Albef, "cap": Cap, "clip": Clip, "coca": Coca, "mammut": Mammut, "siglip": Siglip,
}  # fmt: skip
