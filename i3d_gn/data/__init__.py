"""Videos: which clips, which pixels, which batches."""
