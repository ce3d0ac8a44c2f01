"""Checks that can fail: each wrong version below is caught by the notebook's own check.

A row names the notebook, the cell that checks (by a piece of its text), and what is written wrongly in that cell or
in one it needs. Only those cells run: a cell is needed when it defines a name that a needed one uses.
"""

import json
import logging
from pathlib import Path

import pytest

from nitro_e_lite.course.cells import needed

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
LAYER, BLOCK, MODEL, TAP, AVERAGE, REWARDS, LOSSES, JUMPS, CODES = (
    "split, merge and the whole layer agree",
    "and whole block agree",
    'print("equal to the package")',
    "the place of the tap agree",
    "the engine's differ by at most",
    "torch.testing.assert_close(my_advantages(",
    "clip and forward loss are the package's",
    "circle, tangent, target and loss agree",
    "numbers encoded as torch does, bit for bit",
)
WALK, SCORES, RACE, COST, MEMORY, ORDER = (
    "passes by hand are the finished student's picture",
    "scores and sums are the package's",
    "and the race drew the very same latents",
    "1.5 days mean an MFU",
    "assert math.isclose(size, plan.memory[name])",
    "by hand and in the package: the same rows",
)
AHEAD, V = "(following - sigma)", "velocity(x, sigma)"  # of notebook 16
QUICK = {  # fewer steps, so that a row costs a second
    "02": [("range(64)", "range(4)")],
    "03": [("prompts=6", "prompts=2")],
    "00": [
        ("(caption, 20,", "(caption, 2,"),
        ("picture = pipeline(caption,", "picture = pipeline(caption, 1,"),
        ("s(20)", "s(2)"),
    ],
    "07": [("count=24", "count=2")],
    "09": [
        ("scenes=96", "scenes=4"),
        ("(0.5, 0.7, 0.85, 0.95)", "(0.7,)"),
        ('stage_run.prepare(run, again=preset == "smoke", first=preset != "smoke")', "None"),
    ],
    "10": [
        ("steps=2000", "steps=20"),
        ("steps=1200", "steps=12"),
        ('stage_run.prepare(*stages, again=preset == "smoke", first=preset != "smoke")', "None"),
        ("stage1.train()", "pass"),
        ("run.train()", "None"),
    ],
    "12": [
        (
            'stage_run.prepare(run, again=preset == "smoke")',
            'Drawing(loading.load_pipeline("lite"), GrammarPrompts(seed, 6), small, steps=4, guidance=0.0).run()',
        ),
        ("run.train()", "None"),
        ('"training", resume=True', '"again"'),
        ('loading.load_pipeline(final, "cpu", "float32")', "stage.pipeline()"),
    ],
    "13": [('stage_run.prepare(run, again=preset == "smoke")', "None")],
    "15": [
        ("dict(prompts=12", "dict(prompts=6"),
        ("dict(steps=8", "dict(steps=1"),
        ("dict(steps=4", "dict(steps=1"),
        ("tables.speed_and_quality(everything)", "plt.figure()"),
    ],
    "16": [
        ("demo_worker.Artist(lanes)", "None"),
        ("demo_worker.draw(artist, order)", "[]"),
        ("zip(lanes, results, strict=True)", "zip(lanes, results)"),
        ("(20, 4, 1)}", "(4, 1)}"),
        ("rounds=3", "rounds=1"),
    ],
    "17": [('stage_run.prepare(base, finetune, again=preset == "smoke")', "None")],
}
WRONG = [
    (
        "00",
        "assert_close(x, final",
        "none + guidance * (with_caption - none)",
        "with_caption + guidance * (none - with_caption)",
    ),
    (
        "00",
        "assert_close(x, final",
        "x.repeat(2, 1, 1, 1), features, 1000 * sigma)",
        "x.repeat(2, 1, 1, 1), features, 1000 * following)",
    ),
    (
        "00",
        "assert_close(x, final",
        'features = pipeline.encode_captions(["", caption])',
        "features = pipeline.encode_captions([caption, caption])",
    ),
    ("00", "assert_close(x, final", "(following - sigma) * v", "following * v - sigma * x"),
    ("01", "assert mine ==", "(z >> 27)", "(z >> 28)"),
    ("01", "assert mine ==", "(state ^ key) + STEP", "(state ^ key)"),
    ("01", "assert mine ==", ">> 11) * 2.0**-53", ">> 12) * 2.0**-52"),
    ("01", "equal to the last rounding", "c * y - s * x", "c * y + s * x"),
    ("01", "equal to the last rounding", "np.clip(0.5 - distance", "np.clip(-distance"),
    ("01", "equal to the last rounding", "* o.radius * size  # pixels", "* size  # pixels"),
    ("01", 'check("1 gigabytes of latents", latent_gigabytes', "return None  # your formula", "return 227.7"),
    ("01", 'check("2 ring", ring', "return None  # your formula", "return distance - w"),
    (
        "02",
        "assert_close(space_to_channel(x), F.pixel_unshuffle",
        "permute(0, 1, 3, 5, 2, 4)",
        "permute(0, 1, 5, 3, 2, 4)",
    ),
    ("02", "theirs.load_state_dict(mine", ".mean(2)  # mean over each group", ".sum(2)"),
    ("02", "theirs.load_state_dict(mine", "x.repeat_interleave(self.repeats, 1)", "x.repeat(1, self.repeats, 1, 1)"),
    ("02", "theirs.load_state_dict(mine", "        if self.shortcut:\n", "        if False:\n"),
    ("02", "by_hand = (raw", " / torch.tensor(stored.std).view(1, -1, 1, 1)", ""),
    ("02", 'check("3 first that knows", first', "return None  # an integer", "return 6  #"),
    ("02", 'check("3 first that knows", first', "return None  # an integer", "return len(tokens) - 2  #"),
    ("03", "line, target and both ends", "(1 - t) * x0 + t * noise", "t * x0 + (1 - t) * noise"),
    ("03", "line, target and both ends", "x_t - t * v, x_t + (1 - t) * v", "x_t - v, x_t + (1 - t) * v"),
    ("03", "from the score is the exact field", "(x - weight @ known) / t", "(x - weight @ known)"),
    ("03", "from the score is the exact field", "/ (2 * t**2), dim=1)\n    return", "/ t**2, dim=1)\n    return"),
    ("03", "equal to {(mine - theirs)", "none + scale * (v - none)", "v + scale * (v - none)"),
    ("03", "equal to {(mine - theirs)", "torch.tensor(1000.0 * t", "torch.tensor(1000.0 * t**2"),
    ("03", 'check("2 Heun", heun_step', "None  # velocity(x, t) may", "x + (t_next - t) * velocity(x, t)  #"),
    ("03", 'check("3 useful steps", useful', "None  # your answer", "3"),
    ("04", "equal to torch's RMSNorm", "return self.weight * x *", "return x *"),
    ("04", "equal to torch's RMSNorm", "+ 1e-6).rsqrt()", "+ 1e-5).rsqrt()"),
    ("04", "(MyBlock(M, E), JointBlock(M, E))", "self.norm_q_context(q_text)", "self.norm_q(q_text)"),
    ("04", "(MyBlock(M, E), JointBlock(M, E))", "nn.LayerNorm(width)", "nn.LayerNorm(width, eps=1e-6)"),
    ("04", "(MyBlock(M, E), JointBlock(M, E))", "affine=False, eps=1e-6", "affine=False, eps=1e-5"),
    ("04", "(MyBlock(M, E), JointBlock(M, E))", "* (1 + six[1]) + six[0]", "* (1 + six[0]) + six[1]"),
    ("04", "(MyBlock(M, E), JointBlock(M, E))", "tokens + six[2] * mixed", "tokens + mixed"),
    ("04", "(MyBlock(M, E), JointBlock(M, E))", ', approximate="tanh"', ""),
    ("04", 'check("Exercise 1", largest', "return None  # your line 1", "return 32**0.5"),
    ("04", 'check("Exercise 1", largest', "return None  # your line 3", "return 2 * (8 * width + 32)"),
    (
        "05",
        "equal to torch's pixel unshuffle",
        "grid.transpose(2, 3).flatten(3)",
        "grid.permute(0, 1, 3, 4, 2, 5).flatten(3)",
    ),
    ("05", "torch.equal(scatter(y", "permute(0, 1, 4, 2, 5, 3)", "permute(0, 1, 5, 2, 4, 3)"),
    ("05", "crop_positions(tokens.position_table(64", "for place in (columns, rows)", "for place in (rows, columns)"),
    ("05", "crop_positions(tokens.position_table(64", " + (table_side - side) // 2", ""),
    ("05", "(MyCompressor(64), tokens", 'nn.GELU("tanh")', "nn.GELU()"),
    ("05", "(MyCompressor(64), tokens", "torch.cat([*fine, saved]", "torch.cat([saved, *fine]"),
    ("05", '"reconstructor": MyReinforced(32)', " + my_positions(height, saved.shape[2])", ""),
    ("05", 'check("Exercise 1", middle', "return None  # your line 1", "return 480"),
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
    ("09", "by_hand, row", "1000 * t)", "t)"),  # moves a fresh model's loss by a thousandth
    ("10", AVERAGE, "(1 + k) / (10 + k)", "(2 + k) / (10 + k)"),
    ("10", AVERAGE, "(1 - decay) * (value.detach()", "decay * (value.detach()"),
    ("10", AVERAGE, "ema_update(mine, masters, warm(k,", "ema_update(mine, masters, warm(k + 1,"),
    ("11", REWARDS, "r.mean(1, keepdim=True)", "r.mean()"),
    ("11", REWARDS, "r.std(1, correction=0, keepdim=True)", "r.std(correction=0)"),
    ("11", REWARDS, "math.sqrt(sigma_next**2 - s**2) * x1", "sigma_next * x1"),
    ("11", REWARDS, ".square().flatten(1).mean(1)", ".square().flatten(1).sum(1)"),
    ("11", LOSSES, "torch.maximum(-advantage", "torch.minimum(-advantage"),
    ("11", LOSSES, "old + sign * beta * (v - old)", "old + sign * (v - old)"),
    ("11", LOSSES, "5 / beta * loss", "loss"),
    ("12", WALK, "-1 if jump else level + 1", "level + 1"),  # jumps to the next level alone
    ("12", WALK, ".mean(1) / step**2", ".mean(1)"),
    ("12", WALK, "sign = -1 if real else 1", "sign = 1 if real else -1"),
    ("12", WALK, "(1 - there) * x0 + there * noise", "x0 + there * noise"),
    ("12", WALK, "x + (there - here) * v", "x - here * v"),
    ("12", 'check("passes"', "return None", "return teacher_steps * 2 / student_steps"),  # always guided
    ("12", 'check("between"', "return None", "return x_a + (a - level) * (x_b - x_a)"),
    ("12", 'check("blur"', "return None  #", "return p * a + (1 - p) * b, (a - b) ** 2 / 4  #"),  # true for 1/2 alone
    ("13", JUMPS, "+ (1 - 2 * s_ + 2 * s_**2) * velocity", "+ velocity"),
    ("13", JUMPS, "(weight[:, None] * dxdt, weight)", "(weight[:, None] * dxdt, 0 * t)"),  # along x alone
    ("13", JUMPS, "- r * (cos * sin * x_t", "+ r * (cos * sin * x_t"),
    ("13", 'check("time"', "return None", "return s * math.pi / 2"),
    ("13", 'check("jump"', "return None", "return F"),
    ("13", 'check("strength"', "return None  #", "return rare / usual, rare / (usual + c)  #"),
    ("14", CODES, "(below % 2 == 1)", "(below % 2 == 0)"),  # halves to the odd code
    ("14", CODES, "torch.cat([values, values.new_tensor([65536.0])])", "values"),  # E5M2 without infinity
    ("14", 'check("step"', "return None", "return 2.0 ** (math.frexp(x)[1] - 4)"),  # steps that shrink for ever
    ("14", 'check("bytes"', "return None", "return p * (1 + 4 / group) / 2 + (1 - p)"),
    ("14", 'check("share"', "return None", "return 2 * (1 - 1 / gain)"),
    ("15", SCORES, "fmean(fmean(marks) for marks in by_tag.values())", "fmean(correct)"),  # of pictures, not of kinds
    ("15", SCORES, "fmean(fmean(marks) for", "fmean(max(marks) for"),  # right at least once
    ("15", SCORES, '[row["tag"] for row in rows]', '[row["prompt"] for row in rows]'),
    ("15", 'check("pictures"', "return None", "return 1.96 * p * (1 - p) / half**2"),
    ("15", 'check("lost prompts"', "return None", "return right * count / (count - lost) - right"),
    ("15", 'check("diagonal"', "return None", "return (a - b) / (n - 1)"),
    ("16", RACE, "none + guidance * (told - none)", "told + guidance * (none - told)"),
    ("16", RACE, "1000 * sigma).sample", "1000 * following).sample"),
    ("16", RACE, "x + (following - sigma) * v", "x + (sigma - following) * v"),
    ("16", 'check("bill"', "return None", "return 2 * sum(steps for steps, _ in lanes)"),
    ("16", 'check("limit"', "return None", "return (a + count * b + c) / (a + b)"),
    ("16", 'check("heun"', "return None  #", f"return x + {AHEAD} * {V}  #"),  # Euler's
    ("16", 'check("heun"', "return None  #", f"return x + {AHEAD} * ({V} + velocity(x, following)) / 2  #"),
    ("16", 'check("heun"', "return None  #", f"return x + {AHEAD} * ({V} + velocity(x + {AHEAD} * {V}, sigma)) / 2  #"),
    ("17", COST, "return 3 * forward", "return 2 * forward"),  # backward costs two
    ("17", COST, "if name not in stored", "if name in stored"),
    ("17", MEMORY, "4 * min(count, distributed.BUCKET)", "4 * count"),
    ("17", ORDER, 'stream(seed, epoch, "order")', 'stream(seed, step, "order")'),
    ("17", ORDER, "order[place * batch : (place + 1) * batch]", "order[place : place + batch]"),
    ("17", 'check("hours"', "return None", "return steps * work / (devices * peak * share) / 3600"),  # no exchange
    ("17", 'check("accumulate"', "return None", "return 16"),
    ("17", 'check("interval"', "return None", "return (save * between_kills) ** 0.5"),  # a kill loses half of it
    ("17", 'numbers = {"latents"', "L * 2048", "L * 768"),  # features are as wide as the language model
    ("18", 'check("first loss"', "return None", "return 1 + sum(means) ** 2 + sum(spreads) ** 2"),  # one channel's
    ("18", 'check("start left"', "return None", "return 1 - decay**steps"),  # what arrived
    ("18", "eight logs, again", "dataclasses.replace(run, steps=1)", 'dataclasses.replace(lab.RUNS["sound"], steps=1)'),
    ("18", 'check("diagnosis"', "diagnosis = None", 'diagnosis = dict.fromkeys(lab.RUNS, "rate")'),  # one for all
]


def run(number: str, check: str, old: str = "", new: str = "") -> None:
    """Executes the cells that a check needs, with `old` written as `new`."""
    book = json.loads(next(FOLDER.glob(f"{number}_*.ipynb")).read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    last = next(k for k, cell in enumerate(cells) if check in cell)
    kept = [cells[k] for k in needed(cells, last)]
    if old and not any(old in cell for cell in kept):
        raise LookupError(f"{old!r} is in no cell that the check needs")
    namespace = {"__name__": "lesson"}
    for cell in kept:
        for long, short in QUICK.get(number, ()):
            cell = cell.replace(long, short)
        exec(compile(cell.replace(old, new) if old else cell, f"notebook {number}", "exec"), namespace)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What a lesson writes goes to a folder of the test; the remarks it silences are heard again afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.root.manager, "disable", logging.root.manager.disable)
    monkeypatch.delenv("NITRO_E_FIGURES", raising=False)


@pytest.mark.parametrize(("number", "check"), sorted({row[:2] for row in WRONG if row[0] in QUICK}))
def test_a_check_accepts_what_the_lesson_builds(number, check):
    """Also when it is made quicker; the others run unchanged with their whole notebook."""
    run(number, check)


@pytest.mark.parametrize(("number", "check", "old", "new"), WRONG)
def test_a_check_catches_a_wrong_version(number, check, old, new):
    with pytest.raises(AssertionError):
        run(number, check, old, new)
