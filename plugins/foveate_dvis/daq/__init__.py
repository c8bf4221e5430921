"""DVIS-DAQ (Zhou et al. 2024, arXiv:2404.00086) in plain PyTorch: segmenter, tracker, refiner.

Written from a prose description of the algorithm and checked against recorded inputs and outputs of the original.
Nothing heavy is imported here; start at :mod:`foveate_dvis.daq.network` and :mod:`foveate_dvis.daq.loading`.
"""
