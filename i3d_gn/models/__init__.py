"""Video networks."""

from i3d_gn.models.i3d import I3D, i3d_resnet50, i3d_resnet101, i3d_small, i3d_tiny

__all__ = ["I3D", "i3d_resnet50", "i3d_resnet101", "i3d_small", "i3d_tiny"]
