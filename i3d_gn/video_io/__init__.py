"""Frames of videos by index, and the index of a data set; no torch."""
