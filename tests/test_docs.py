import ast
import re
from pathlib import Path

import numpy as np
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"


def code_of(page):
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.M | re.S)


def test_code_of_the_page_on_extending_runs():
    names = {}
    blocks = code_of("extend.md")
    for block in blocks:
        exec(compile(block, "extend.md", "exec"), names)
    assert len(blocks) == 5
    assert names["logits"].shape == (1, 10)
    assert names["map_size"] == (4, 7, 7)
    assert names["features"].shape == (2, 64)
    indices = names["indices"]
    assert (indices // 37.5 == np.arange(8)).all()  # one in each eighth of 300 frames
    assert 15 <= sum(sample.item >= 98 for sample in names["batch"]) <= 49  # half of 64
    assert [sample.position for sample in names["batch"]] == list(range(448, 512))
    # Rows of the RMS norm have a mean square of 1 per group.
    y = names["GroupRMSNorm"](4, 8)(torch.randn(2, 8, 3, 4, 5) * 7 + 3)
    mean_square = y.reshape(2, 4, -1).square().mean(-1)
    torch.testing.assert_close(mean_square, torch.ones(2, 4), rtol=1e-4, atol=0)


def test_python_in_the_docs_is_valid():
    found = 0
    for page in DOCS.glob("*.md"):
        for block in code_of(page.name):
            ast.parse(block)
            found += 1
    assert found >= 6
