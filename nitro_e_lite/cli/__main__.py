"""`python -m nitro_e_lite.cli` is `nitro-e`."""

from nitro_e_lite.cli.app import app

app()
