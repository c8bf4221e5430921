"""Ways of explaining: gradients and perturbation by Captum, attention by the capture engine, and controls.

Nothing is imported here; see :mod:`foveate.attribution.declare` for what there is.
"""
