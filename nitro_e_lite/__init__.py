"""Nitro-E Lite: AMD's Nitro-E text-to-image model, rebuilt component by component.

    import nitro_e_lite
    pipeline = nitro_e_lite.load_pipeline("lite")
    pipeline("two red stars", num_inference_steps=20).images[0].save("stars.png")

Importing the package is cheap on purpose: torch, diffusers and transformers are loaded by the module that
needs them, the first time `load_pipeline` is asked for.
"""

import logging
from typing import Any

for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    # importing diffusers imports torchao, and the three complain about binaries and deprecations of each other's
    logging.getLogger(_name).setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["__version__", "load_pipeline"]


def __getattr__(name: str) -> Any:
    if name == "load_pipeline":
        from nitro_e_lite.inference.loading import load_pipeline

        return load_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
