"""The packages of the wheel, the folder configs/ among them; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["i3d_gn*", "data_tools*"]), "i3d_gn.configs"],
    package_dir={"i3d_gn.configs": "configs"},
)
