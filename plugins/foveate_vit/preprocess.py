"""Preprocessing of pictures: :mod:`foveate.pretrained.preprocess`, where all plugins find it."""

from foveate.pretrained.preprocess import DEFAULTS, LARGEST_RESIZED, Recipe

__all__ = ["DEFAULTS", "LARGEST_RESIZED", "Recipe"]
