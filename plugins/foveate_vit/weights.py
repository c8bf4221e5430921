"""Reading weights: :mod:`foveate.pretrained.weights`, where all plugins find it."""

from foveate.pretrained.weights import (
    all_tensors,
    check_finite,
    check_hash,
    check_keys,
    convert_command,
    read_state,
    refused_pickle,
    sha256_of,
    weight_files,
)

__all__ = [
    "all_tensors",
    "check_finite",
    "check_hash",
    "check_keys",
    "convert_command",
    "read_state",
    "refused_pickle",
    "sha256_of",
    "weight_files",
]
