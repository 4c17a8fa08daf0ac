"""Towers by name (`config.model.image_tower.name`, `config.model.text_tower.name`).

A tower is a flax module with `kind` "image" or "text". An image tower is called as `vit.ViT` is and returns tokens
[B N D], pooled [B D] or None, and kept; a text tower is called as `text.Text` is.
"""

from vlp.models.convnext import ConvNeXt
from vlp.models.resnet import ResNet
from vlp.models.text import Text
from vlp.models.vit import ViT

TOWERS = {"convnext": ConvNeXt, "resnet": ResNet, "transformer": Text, "vit": ViT}
