"""Sphinx: `make docs` writes the site to docs/_build/html; warnings are errors."""

import re

from i3d_gn import __version__

project = "i3d_gn"
author = copyright = "the authors of i3d_gn"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"i3d_gn {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build"]
default_role = "literal"  # docstrings have single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
myst_heading_anchors = 3


def escape_shapes(app, what, name, obj, options, lines):
    """`(N, C, *)` is not the start of emphasis, nor `num_channels: C.` that of a list."""
    for number, line in enumerate(lines):
        shape = re.sub(r"(?<![\w`*])([*|])(?=[^\s\w*])", r"\\\1", line)
        lines[number] = re.sub(r": ([A-Z])\.$", r": \1\\.", shape)


def setup(app):
    """Register `escape_shapes` before napoleon."""
    app.connect("autodoc-process-docstring", escape_shapes, priority=400)
