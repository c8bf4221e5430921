"""PLONK, the flow-matching geolocator (Dufour et al. 2024, arXiv:2412.06781), and where it looks."""
