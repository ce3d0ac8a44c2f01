"""Notebooks as tests: every cell must run. A busy machine may take its time to hand over an output."""


def pytest_collection_modifyitems(config, items):
    config.option.nbval_kernel_startup_timeout = 180
    for item in items:
        if hasattr(item, "output_timeout"):  # nbval's own default is 5 seconds
            item.output_timeout = 120
