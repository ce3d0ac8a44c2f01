"""Which layers of a transformer go into FP8, as data, with the reason of each.

`POLICIES` has an ordered list of rules for each class of transformer. For E-MMDiT the reasons are measured:
`fp8_sensitivity` rounds one layer at a time and reports how far the velocity moves. Rounding all weights of the lite
model moves it by 2.8 %; with the policy it is 1.5 %, so that two thirds of the error, in squares, were due to four
small layers which read the latents, merge the tokens and write the velocity. They stay in 16 bit. Layers that embed
text and noise level, which one would spare by habit, hardly show. Rounding the activations of the layers in FP8 moves
the velocity by 1.7 % in E4M3 and by 3.4 % in E5M2. bf16 alone moves it by 0.8 %.

Measured on steps 1, 5 and 9 of 12 of a guided drawing of four held-out captions (every 75th, seeds 0 to 3), in float32,
the last step apart where it is named.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.model.fp8_codes import E5M2, FN, GRANULARITIES

PRECISIONS = ("fp8", "weight", "16")
ACTIVATIONS: dict[str, torch.dtype] = {"e4m3": FN, "e5m2": E5M2}


@dataclass(frozen=True)
class Rule:
    """Linear layers whose whole name fits `pattern`.

    Attributes:
        pattern: regular expression.
        precision: "fp8", whatever the rung does; "weight": FP8 weights with 16-bit activations on every rung but bf16;
            "16": 16 bit.
        why: the reason.
    """

    pattern: str
    precision: str
    why: str

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise InvalidValue(f"precision: {self.precision!r} is not one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Policy:
    """What happens to each Linear layer of a transformer; anything else (norms, biases, convolutions) stays in 16 bit.

    Attributes:
        rules: the first that fits counts; a layer that none fits is "fp8".
        granularity: scales for each "row" of a weight and each token, or one for each "tensor".
        activations: "e4m3", or "e5m2" to compare with.
    """

    rules: tuple[Rule, ...] = ()
    granularity: str = "row"
    activations: str = "e4m3"

    def __post_init__(self):
        if self.granularity not in GRANULARITIES:
            raise InvalidValue(f"granularity: {self.granularity!r} is not one of {', '.join(GRANULARITIES)}")
        if self.activations not in ACTIVATIONS:
            raise InvalidValue(f"activations: {self.activations!r} is not one of {', '.join(ACTIVATIONS)}")

    def of(self, name: str) -> Rule:
        """The rule for a layer."""
        for rule in self.rules:
            if re.fullmatch(rule.pattern, name):
                return rule
        return Rule(".*", "fp8", "the bulk of weights and arithmetic")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Policy:
        """The policy that `to_dict` wrote."""
        return Policy(**{**values, "rules": tuple(Rule(**rule) for rule in values["rules"])})


_FEW_ROWS = "works on a row a picture, where FP8 products gain nothing"
POLICIES = {
    "EMMDiTTransformer2DModel": Policy(
        (
            Rule("patch_embed", "16", "reads the latents: alone 0.9 % (weights), 1.8 % (activations)"),
            Rule(
                r"reconstructor\.merge\.\d",
                "16",
                "all tokens pass it: alone 1.1 and 1.3 % (weights), 1.4 and 3.2 % (activations)",
            ),
            Rule("proj_out", "16", "writes the velocity: alone 1.0 % (weights), 1.0 % (activations)"),
            Rule(
                r"time_embed\.embed\.linear_2",
                "16",
                "steers every block: alone 0.2 % (weights), 0.3 % (activations), in the last step 0.8 and 1.9 %",
            ),
            Rule(r"time_embed\..*", "weight", f"{_FEW_ROWS}; alone 0.1 to 0.2 % (weights)"),
            Rule(r".*\.modulation\.linear", "weight", f"{_FEW_ROWS}; a third of the weights with the kind adaln"),
        )
    ),
    "SD3Transformer2DModel": Policy(
        (
            Rule("context_embedder", "16", "reads the text, once a step"),
            Rule(r"time_text_embed\..*", "16", "steers every block"),
            Rule(r"norm_out\.linear", "16", "modulates the last layer"),
            Rule("proj_out", "16", "writes the velocity"),
            Rule(r".*\.norm1(_context)?\.linear", "weight", f"{_FEW_ROWS}; a third of the weights"),
        )
    ),
}
"""By the class of a transformer. Percentages: how far the lite model's velocity moves when this layer alone is rounded,
see the module's essay. The rules of SD3 follow from the same roles; nobody has measured them here."""


def policy_for(model: nn.Module) -> Policy:
    """The policy of a transformer's class.

    Raises:
        ValueError: there is none.
    """
    name = type(model).__name__
    if name not in POLICIES:
        raise InvalidValue(f"model: no FP8 policy for {name} (there is one for {', '.join(POLICIES)}); give policy=")
    return POLICIES[name]
