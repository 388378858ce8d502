"""What tests of `i3d-gn index` share."""

import json
from pathlib import Path

from i3d_gn import cli


def run(*arguments, workers=1):
    """The exit status of `i3d-gn index` with these arguments."""
    return cli.main(["index", *map(str, arguments), "--workers", str(workers)])


def report_of(output):
    """The report that was written beside the index `output`."""
    return json.loads(Path(f"{output}.report.json").read_text())
