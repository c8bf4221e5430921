"""A third party's foveate plugin: a source for a hand-written ViT, a metric and a renderer."""
