"""The first-party plugin for vision transformers: ViT, DeiT, DINOv2/3, CLIP, SigLIP, and PLONK."""
