"""Samples and batches: which frames, which crops, in which order."""
