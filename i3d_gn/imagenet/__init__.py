"""Image classification: the paper's Tables 1 to 3."""
