"""Weights of this and other codebases: read, download, convert."""
