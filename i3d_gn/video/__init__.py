"""Video classification: train, evaluate with 10 clips, report."""
