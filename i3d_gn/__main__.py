"""Run `i3d-gn` as a module: `python -m i3d_gn train CONFIG`, `torchrun -m i3d_gn train CONFIG`."""

import sys

from i3d_gn.cli import main

if __name__ == "__main__":
    sys.exit(main())
