"""Training methods by name (`config.objective.name`); one file each."""

from vlp.objectives.cap import Cap
from vlp.objectives.clip import Clip
from vlp.objectives.coca import Coca
from vlp.objectives.siglip import Siglip

OBJECTIVES = {"cap": Cap, "clip": Clip, "coca": Coca, "siglip": Siglip}
