"""Opening models of transformers: :mod:`foveate.pretrained.loading`, where all plugins find it."""

from foveate.pretrained.loading import Loaded, import_transformers, load_model, read_side_file, torch_dtype

__all__ = ["Loaded", "import_transformers", "load_model", "read_side_file", "torch_dtype"]
