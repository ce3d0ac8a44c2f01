"""What the published code calls the weights of this project's model: rules that every reader and writer shares."""

import re

from nitro_e_lite.errors import InvalidValue

# Our name (regular expression) -> official names (one, or three for a fused matrix).
_BLOCK = r"groups\.(\d+)\.(\d+)\."
_OFFICIAL_BLOCK = r"block_groups.\1.\2."
_RULES = [
    (r"positions", ["pos_embed.pos_embed"]),
    (r"patch_embed\.(\w+)", [r"pos_embed.proj.\1"]),
    (r"text_embed\.(\w+)", [r"context_embedder.\1"]),
    (r"time_embed\.embed\.(.+)", [r"adaln_single.emb.timestep_embedder.\1"]),
    (r"time_embed\.project\.(\w+)", [r"adaln_single.linear.\1"]),
    (_BLOCK + r"attention\.qkv\.(\w+)", [_OFFICIAL_BLOCK + rf"attn.to_{x}.\3" for x in "qkv"]),
    (_BLOCK + r"attention\.qkv_context\.(\w+)", [_OFFICIAL_BLOCK + rf"attn.add_{x}_proj.\3" for x in "qkv"]),
    (_BLOCK + r"attention\.norm_([qk])\.weight", [_OFFICIAL_BLOCK + r"attn.norm_\3.weight"]),
    (_BLOCK + r"attention\.norm_([qk])_context\.weight", [_OFFICIAL_BLOCK + r"attn.norm_added_\3.weight"]),
    (_BLOCK + r"attention\.out\.(\w+)", [_OFFICIAL_BLOCK + r"attn.to_out.0.\3"]),
    (_BLOCK + r"attention\.out_context\.(\w+)", [_OFFICIAL_BLOCK + r"attn.to_add_out.\3"]),
    (_BLOCK + r"image\.norm1\.(\w+)", [_OFFICIAL_BLOCK + r"norm1.\3"]),
    (_BLOCK + r"text\.(?:norm1\.)?(weight|bias)", [_OFFICIAL_BLOCK + r"norm1_context.\3"]),
    (_BLOCK + r"image\.modulation\.(\w+)", [_OFFICIAL_BLOCK + r"scale_shift_\3"]),
    (_BLOCK + r"text\.modulation\.(\w+)", [_OFFICIAL_BLOCK + r"scale_shift_\3_c"]),
    (_BLOCK + r"image\.mlp\.up\.(\w+)", [_OFFICIAL_BLOCK + r"ff.net.0.proj.\3"]),
    (_BLOCK + r"image\.mlp\.down\.(\w+)", [_OFFICIAL_BLOCK + r"ff.net.2.\3"]),
    (_BLOCK + r"text\.mlp\.up\.(\w+)", [_OFFICIAL_BLOCK + r"ff_context.net.0.proj.\3"]),
    (_BLOCK + r"text\.mlp\.down\.(\w+)", [_OFFICIAL_BLOCK + r"ff_context.net.2.\3"]),
    (r"(compressor|reconstructor)\.paths\.0\.0\.(\w+)", [r"token\1.0.0.body2x.1.\2"]),
    (r"(compressor|reconstructor)\.paths\.0\.2\.(\w+)", [r"token\1.0.0.body2x.3.\2"]),
    (r"(compressor|reconstructor)\.paths\.1\.0\.(\w+)", [r"token\1.0.0.body4x.1.\2"]),
    (r"(compressor|reconstructor)\.paths\.1\.2\.(\w+)", [r"token\1.0.0.body4x.3.\2"]),
    (r"reconstructor\.merge\.(.+)", [r"tokenreconstructor.0.0.mergers.\1"]),
    (r"projector\.(.+)", [r"projectors.0.\1"]),
    (r"proj_out\.(\w+)", [r"proj_out.\1"]),
]


def official_names(name: str) -> list[str]:
    """The official names of one entry of our state dict: one, or three for a fused matrix.

    Raises:
        ValueError: The official layout has no place for it.
    """
    for pattern, templates in _RULES:
        if match := re.fullmatch(pattern, name):
            return [match.expand(template) for template in templates]
    raise InvalidValue(f"the official layout has no place for {name!r}")
