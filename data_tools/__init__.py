"""Prepare videos for training: download, extract, resize, verify, index, pack. No torch.

Each command is a file, run as `i3d-gn NAME` or `python data_tools/FILE.py`; the commands share the
other files.
"""
