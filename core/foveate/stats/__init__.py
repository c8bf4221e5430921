"""Numbers only: ranks with ties, intervals over images, paired tests. Knows no image, model or store."""
