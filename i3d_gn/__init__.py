"""Video classification with 3-D group normalization (Wu & He, arXiv:1803.08494)."""

__version__ = "0.1.0"
