"""From the videos that people have to what training reads: make, resize and index them.

Each command is a file of its own, run as ``python data_tools/NAME.py`` or as a subcommand of
``i3d-gn``; the other files are what they share.
"""
