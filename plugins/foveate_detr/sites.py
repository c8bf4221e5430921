"""Declared sites in a live model: :mod:`foveate.pretrained.sites`, where all plugins find it."""

from foveate.pretrained.sites import find_sites

__all__ = ["find_sites"]
