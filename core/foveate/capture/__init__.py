"""The engine: exact attention of any model, lazily recorded, at about the price of its forward pass.

:func:`foveate.capture.trace.trace` keeps lazy records of one forward,
:func:`foveate.capture.engine.capture_batch` keeps what a plan asks for, and
:func:`foveate.capture.certify.certify` proves both. ``rollout``, ``relevance`` and ``gradient_maps`` follow
information through a trace. :class:`foveate.capture.tap.Tap` works on any ``torch.nn.Module``.

A reader follows one q from ``tap`` through ``dense``, ``blocks`` and ``reductions`` to ``engine``.
"""
