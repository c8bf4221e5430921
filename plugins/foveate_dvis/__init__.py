"""Video: DVIS-DAQ in plain PyTorch, VidEoMT, video vision transformers and a small segmenter that ships."""
