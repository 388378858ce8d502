"""Object detection and segmentation: the paper's Tables 4 to 7."""
