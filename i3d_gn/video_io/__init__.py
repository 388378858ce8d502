"""Frames of videos by index, and the index of a dataset. Does not import torch."""
