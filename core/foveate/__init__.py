"""foveate: what vision and video transformers attend to, and whether that explains their answer."""
