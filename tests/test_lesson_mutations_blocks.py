"""Checks that can fail, notebooks 06 to 10: see `test_lesson_mutations`, whose bench runs them."""

import pytest
from test_lesson_mutations import QUICK, elsewhere, run  # noqa: F401  (elsewhere: where lessons write)

LAYER, BLOCK, MODEL, TAP, AVERAGE = (
    "split, merge and the whole layer agree",
    "and whole block agree",
    'print("equal to the package")',
    "the place of the tap agree",
    "the engine's differ by at most",
)
QUICK |= {
    "07": [("count=24", "count=2")],
    "09": [
        ("scenes=96", "scenes=4"),
        ("(0.5, 0.7, 0.85, 0.95)", "(0.7,)"),
        ('stage_run.prepare(run, again=preset == "smoke")', "None"),
    ],
    "10": [
        ("steps=2000", "steps=20"),
        ("steps=1200", "steps=12"),
        ('stage_run.prepare(*stages, again=preset == "smoke")', "None"),
        ("stage1.train()", "pass"),
        ("run.train()", "None"),
    ],
}
WRONG = [
    ("06", LAYER, "layer.norm_q_context(q_text)", "layer.norm_q(q_text)"),  # the wrong stream's gain
    ("06", LAYER, "layer.norm_k(k), ", "k, "),  # no gain
    ("06", LAYER, "layer.out_context(text)", "layer.out(text)"),
    ("06", LAYER, "query.shape[-1] ** 0.5", "query.shape[-1]"),
    ("06", LAYER, "split(text, ratio, chunk)", "split(text, ratio, 1)"),
    ("07", BLOCK, "tokens * (1 + scale) + shift", "tokens * (1 + shift) + scale"),
    ("07", BLOCK, "block.text.norm1(text)", "block.image.norm1(text)"),
    ("07", BLOCK, "block.text.norm2, block.text.mlp", "block.text.norm1, block.text.mlp"),  # a gain too many
    ("07", BLOCK, "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]"),
    ("07", BLOCK, "self.bias + six * (1 + self.scale)", "self.bias + six * self.scale"),
    ("08", MODEL, "saved, height, width) + positions", "saved, height, width)"),  # no position reinforcement
    ("08", MODEL, "patterns[i % 3], context", "patterns[(i + 1) % 3], context"),
    ("08", MODEL, "self.norm_out(image)", "image"),
    ("08", MODEL, "saved, image = image, self.comp", "saved, image = image.flip(1), self.comp"),
    ("09", TAP, "time_embed(1000 * t)", "time_embed(t)"),
    ("09", TAP, "patchify(x_t, 1)) + crop_positions(model.positions, 16, 16)", "patchify(x_t, 1))"),
    ("09", TAP, "nn.Sequential(first, nn.SiLU(), second", "nn.Sequential(first, nn.GELU(), second"),
    ("09", TAP, "-(projected * features).sum(-1).mean(1)", "1 - (projected * features).sum(-1).mean(1)"),
    ("10", AVERAGE, "(1 + k) / (10 + k)", "(2 + k) / (10 + k)"),
    ("10", AVERAGE, "(1 - decay) * (value.detach()", "decay * (value.detach()"),
    ("10", AVERAGE, "ema_update(mine, masters, warm(k,", "ema_update(mine, masters, warm(k + 1,"),
]


@pytest.mark.parametrize(("number", "check"), sorted({row[:2] for row in WRONG}))
def test_a_check_accepts_what_the_lesson_builds(number, check):
    run(number, check)


@pytest.mark.parametrize(("number", "check", "old", "new"), WRONG)
def test_a_check_catches_a_wrong_version(number, check, old, new):
    with pytest.raises(AssertionError):
        run(number, check, old, new)
