"""Runs side by side: a table, a figure, and a page that opens from disk; no torch."""
