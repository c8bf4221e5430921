"""Samples in, labelled arrays on disk: images, manifests, the zarr layout, runs and their validation."""
