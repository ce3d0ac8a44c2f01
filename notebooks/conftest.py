"""Notebooks as tests: every cell must run. A busy machine may take its time to hand over an output."""

import pytest


def pytest_cmdline_main(config):
    """Outputs may differ from the stored ones; the kernel is that of this environment."""
    if hasattr(config.option, "nbval_lax"):
        config.option.nbval_lax = config.option.nbval_current_env = True
    elif config.args_source is not pytest.Config.ArgsSource.ARGS:
        raise pytest.UsageError('nbval is missing, and notebooks are tests: pip install -e ".[test]"')


def pytest_collection_modifyitems(config, items):
    config.option.nbval_kernel_startup_timeout = 180
    for item in items:
        if hasattr(item, "output_timeout"):  # nbval's own default is 5 seconds
            item.output_timeout = 120
