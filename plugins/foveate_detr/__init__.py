"""Detectors and segmenters of the DETR family as sources of labelled attention, object by object."""
