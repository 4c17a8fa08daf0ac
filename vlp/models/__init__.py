"""Models and towers by name (`config.model.name`, `config.model.image_tower.name`)."""

from vlp.models.towers import TOWERS as TOWERS
from vlp.models.two_tower import TwoTower

MODELS = {"two_tower": TwoTower}
