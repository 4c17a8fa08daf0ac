"""The demo dataset: emoji as pictures, with their names as captions."""

from vlp.data.emoji.dataset import Emoji, build, find
from vlp.data.emoji.ideas import TONES, assign_splits, base_of, is_flag, tone_of

__all__ = ["TONES", "Emoji", "assign_splits", "base_of", "build", "find", "is_flag", "tone_of"]
