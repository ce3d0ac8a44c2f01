"""The proof on an accelerator, one command of under ten minutes: `python -m pytest tests/gpu -m gpu -s`.

Without one, the same checks run at tiny size on the CPU, and those of full size are shown as "needs an accelerator".
"""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from proof import CHECKS, FULL, TINY  # noqa: E402

NAMES = [check.__name__ for check in CHECKS]


@pytest.mark.parametrize("check", CHECKS, ids=NAMES)
def test_dry_run(check, tmp_path):
    """It runs, and finds nothing wrong at tiny size."""
    found = check(TINY, tmp_path)
    assert found and json.dumps(found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("check", CHECKS, ids=NAMES)
def test_on_an_accelerator(check, tmp_path):
    """The full model. What was measured is printed: run with -s."""
    print(f"\n{check.__name__}: {json.dumps(check(FULL, tmp_path), indent=1)}")
