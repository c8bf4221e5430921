"""Targets of classifiers: :mod:`foveate.pretrained.choices`, where all plugins find it."""

from foveate.pretrained.choices import TOP, bind_choice, one_kind, score_choice, top_predictions

__all__ = ["TOP", "bind_choice", "one_kind", "score_choice", "top_predictions"]
