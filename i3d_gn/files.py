"""Files that appear complete or not at all, and their hashes."""
