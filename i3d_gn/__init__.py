"""Video classification with 3-D group normalisation (Wu & He, arXiv:1803.08494)."""

__version__ = "0.1.0"
