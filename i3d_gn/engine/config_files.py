"""The configs that come with the package, by name."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def config_files() -> dict[str, Path]:
    """Name, such as `kinetics400/gn_32x2_8clips`, to file.

    The wheel contains the folder `configs/` of the repository as `i3d_gn/configs/`.
    """
    installed, checkout = _PACKAGE / "configs", _PACKAGE.parent / "configs"
    folder = installed if installed.is_dir() else checkout
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yaml"))
    }
