"""Towers by name: `config.model.image_tower.name` and `config.model.text_tower.name`."""

from vlp.models.text import Text
from vlp.models.vit import ViT

TOWERS = {"transformer": Text, "vit": ViT}
