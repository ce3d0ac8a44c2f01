"""Notebooks as tests: every cell must run. A busy machine may take its time to hand over an output."""

import pytest


def pytest_collection_modifyitems(config, items):
    config.option.nbval_kernel_startup_timeout = 180
    for item in items:
        if hasattr(item, "output_timeout"):  # nbval's own default is 5 seconds
            item.output_timeout = 120


def pytest_xdist_auto_num_workers(config):
    """Notebooks that are named run in one process; otherwise tests/conftest.py decides."""
    return 0 if config.args_source is pytest.Config.ArgsSource.ARGS else None
