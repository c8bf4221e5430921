"""Objects: overlap of boxes and matching of predicted to true objects."""
