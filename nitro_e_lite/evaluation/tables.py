"""README's results table and the figure beside it, made from result cards and from nothing else.

`results.json` has the rows in words: what, the paper's figure, a template that names cards and their fields. Table 2
puts the paper's column beside what is counted here. A figure in the manner of the paper's Figure 1 shows speed against
quality, the paper's models by its own numbers, the lite models by their cards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from nitro_e_lite import viz
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.evaluation import cards as result_cards
from nitro_e_lite.evaluation import peers
from nitro_e_lite.evaluation.geneval_lite import autoencoder_ceiling
from nitro_e_lite.files import find_weights, read_json
from nitro_e_lite.inference.encoders import LatentStats
from nitro_e_lite.inference.hub import load_autoencoder
from nitro_e_lite.inference.loading import load_transformer
from nitro_e_lite.model import fp8
from nitro_e_lite.model.flops import build_on_meta, model_config
from nitro_e_lite.model.fp8_ladder import Choice
from nitro_e_lite.scenes.geneval import CATEGORIES, load_prompts
from nitro_e_lite.stats import paired_interval

ROWS = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- written by nitro-e tables -->", "<!-- end of what nitro-e tables wrote -->"
FIGURE = "speed_and_quality"
HELD_OUT, NEW = "held_out_prompts", "held_out_compositions"
Cards = Mapping[str, Mapping[str, Any]]


def count_all() -> dict[str, Any]:
    """What is known without drawing: every row of Table 2, the text encoders, the bytes in FP8, the shipped encoders.

    Returns:
        The values of a card of the kind "counts".
    """
    found = {key: peers.count(peer) for key, peer in peers.load_peers().items()}
    rows = {
        key: {"parameters": one.parameters, "tflops_weights": one.weights / 1e12, "tflops": one.tflops}
        for key, one in found.items()
        if one is not None
    }
    ratios = {}
    for size in ("full", "lite"):
        model = build_on_meta(model_config(size)).to(torch.bfloat16)
        ratios[size] = fp8.quantize_model(model, choice=Choice("weight_only")).bytes.ratio
    with tempfile.TemporaryDirectory() as folder:
        model = load_transformer("lite").to(torch.bfloat16)
        fp8.quantize_model(model, choice=Choice("weight_only"))
        ratios["lite_file"] = fp8.file_bytes(fp8.save(model, folder)).ratio
    vae, probe = find_weights("lite") / "vae", find_weights("lite") / "vision" / "probe.json"
    ceiling = autoencoder_ceiling(load_autoencoder(vae), LatentStats.load(vae), load_prompts())
    return {"rows": rows, "fp8": ratios, "autoencoder": ceiling, "vision": read_json(probe)["trained"]}


def results_table(cards: Cards) -> str:
    """The rows of `results.json`, filled in; then what cards that need not be there say.

    Raises:
        ValueError: a row names a card or a field that is not there.
    """
    lines = ["| what | paper | measured or computed here | command |", "|---|---|---|---|"]
    for row in read_json(ROWS)["rows"]:
        try:
            here, command = (result_cards.fill(row[name], cards) for name in ("here", "command"))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise InvalidValue(f"{ROWS.name}, {row['what']!r}: there is no card or field {error}") from None
        lines.append(f"| {row['what']} | {row['paper']} | {here} | `{command}` |")
    more = (_chain, _against_sana, _drawn, _fp8_speed, _against_16_bit)
    return "\n".join(lines + [line for part in more for line in part(cards)])


def _chain(cards: Cards) -> list[str]:
    """What a lite model takes from nothing, and what it is worth on the way."""
    lines = []
    for card in (card for card in cards.values() if card["kind"] == "chain"):
        what = f"a {card['preset']} model from nothing, {card['machines']}: minutes, and GenEval-lite then (goal: 0.90 "
        what += "after 60)"
        found = [
            f"{row['name']} {row['minutes']:,.0f}, {row['overall']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            for row in card["rows"]
        ]
        lines.append(f"| {what} | - | {'; '.join(found)} | `{card['command']}` |")
    return lines


def _against_sana(cards: Cards) -> list[str]:
    """How many times as fast as Sana-0.6B, with random weights."""
    lines = []
    for card in (card for card in cards.values() if card["kind"] == "peers"):
        for batch, ratios in card.get("ratios", {}).items():
            if not set(peers.FEW) <= ratios.keys():
                continue  # the machine was gone before
            what = f"times as fast as Sana-0.6B, random weights, batch {batch}, {card['rows'][0]['dtype']}, "
            what += f"{'compiled, ' * bool(card.get('compiled'))}{card['environment']['device_name']}: end to end; "
            what += "transformer alone; the same with E-MMDiT in 4 unguided steps (Sana-0.6B always in 20 guided ones)"
            found = [ratios[key][kind] for key in peers.FEW for kind in ("end_to_end", "transformer")]
            here = "; ".join(f"{one:.2f}" for one in found)
            lines.append(f"| {what} | 3.07 end to end (bar) | {here} | `{card['command']}` |")
    return lines


def _drawn(cards: Cards) -> list[str]:
    """Caption to pixels with the full model at random weights, on an accelerator."""
    lines = []
    for card in (card for card in cards.values() if card["kind"] == "drawing"):
        what = f"full model at random weights, caption to pixels, {card['environment']['device_name']}; goals on an "
        what += "H200: 60 pictures a second in 20 steps, 150 in 4"
        found = [
            f"{_steps(row)}, {_batch(row)}: {row['images_per_second']:.1f}/s, {1000 * row['seconds']:.0f} ms, "
            f"{row['memory_bytes'] / 1e9:.1f} GB"
            for row in card["rows"]
        ]
        paper = "MI300X, batch 32: 18.83/s and 39.36/s; batch 1: 398 and 99 ms"
        lines.append(f"| {what} | {paper} | {'; '.join(found)} | `{card['command']}` |")
    return lines


def _fp8_speed(cards: Cards) -> list[str]:
    """Passes of a transformer in FP8 beside bfloat16, on an accelerator."""
    lines = []
    for card in (card for card in cards.values() if card["kind"] == "fp8_speed"):
        what = "a pass in FP8, times as fast as in bfloat16 and share of its memory, random weights, "
        what += card["environment"]["device_name"]
        found = [f"{row['name']}, {_batch(row)}: {row['ratio']:.2f}, {row['memory']:.2f}" for row in card["rows"]]
        lines.append(f"| {what} | 1.8 (SD3.5 article) | {'; '.join(found)} | `{card['command']}` |")
    return lines


def _batch(row: Mapping[str, Any]) -> str:
    return f"batch {row['batch']}{', compiled' * row['compiled']}"


def _against_16_bit(cards: Cards) -> list[str]:
    """What FP8 changes, picture by picture."""
    found = []
    for card in compared_cards(cards):
        other = card.get("against")
        same = other and all(other.get(name) == card[name] for name in ("model", "steps", "guidance"))
        if same and card.get("fp8") and not other.get("fp8"):
            score, near = other["score"], card["psnr"]
            here = f"`{card['model']}`, {_steps(card)}, {score[0]:+.4f} ({score[1]:+.4f} to {score[2]:+.4f}), "
            here += f"lost {100 * other['lost']:.2f} %, won {100 * other['won']:.2f} %, "
            here += f"{near['median']:.1f} dB ({near['low']:.1f} to {near['high']:.1f}; {near['pictures']} pictures)"
            found.append(here)
    what = "FP8 minus 16 bit, GenEval-lite of the same pictures (bar: within 0.01); pictures that are right in 16 bit "
    what += "alone (lost: no switch to 16 bit wins back more) and in FP8 alone (won); "
    what += "PSNR, median and 90 % of the pictures compared"
    command = "nitro-e evaluate --fp8 --against CARD"
    return [f"| {what} | no visible loss (SD3.5 article) | {'<br>'.join(found)} | `{command}` |"] if found else []


def rebuild(readme: str, cards: Cards) -> str:
    """README's text with the table rebuilt between its two markers; see `split`."""
    before, after = split(readme)
    return f"{before}{BEGIN}\n{results_table(cards)}\n\n{lite_models(cards)}\n{END}{after}"


def split(readme: str) -> tuple[str, str]:
    """README's text before and after what is written between its two markers.

    Raises:
        ValueError: the markers are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InvalidValue(f"README.md: lacks {BEGIN if not begin else END}")
    return before, after


def lite_models(cards: Cards) -> str:
    """The lite models side by side: what they weigh and take, what is right, how it looks; names link to the cards."""
    names, folder = {id(card): name for name, card in cards.items()}, "nitro_e_lite/evaluation/cards"
    scored, compared = lite_cards(cards).values(), compared_cards(cards)
    floor = max((1000 * card["appearance"]["kid_floor"][0] for card in compared), default=0.0)
    columns = f"model|MB|passes|ms|right|compositions|reader|preference|diversity|KID (floor {floor:.1f})"
    lines = [f"| {columns.replace('|', ' | ')} |", "|" + "---|" * (columns.count("|") + 1)]
    for card in compared:
        seen, ms = card["appearance"], milliseconds(card, cards)
        new = next((one for one in scored if one["prompt_list"] == NEW and _same_model(one, card)), None)
        cells = [
            f"[{label(card).replace(', ', ',<br>').replace(' ', '&nbsp;')}]({folder}/{names[id(card)]}.json)",
            f"{weights_bytes(card) / 1e6:.1f}",
            str(passes(card)),
            f"{ms:.0f}" if ms else "-",
        ]
        cells += [_spread(card["overall"], card["low"], card["high"])]
        cells += [_spread(new["overall"], new["low"], new["high"]) if new else "-"]
        cells += [f"{seen['reader']:.3f}", f"{seen['preference']:.2f}"]
        cells += ["-" if seen["diversity"] is None else f"{seen['diversity']:.3f}"]  # of captions right twice, if any
        kid, half = (1000 * value for value in seen["kid"])
        lines.append(f"| {' | '.join([*cells, f'{kid:.1f} ± {half:.1f}'])} |")
    return "\n".join(lines)


def _spread(value: float, low: float, high: float) -> str:
    """`0.916 ± 0.013`: the wider half of the interval, on one line."""
    return f"{value:.3f}&nbsp;±&nbsp;{max(value - low, high - value):.3f}"


def by_category(cards: Cards) -> str:
    """GenEval-lite of the same models: against `lite` picture by picture, and by category; 95 % intervals."""
    lines = [f"| model | minus lite | {' | '.join(CATEGORIES)} |", "|" + "---|" * (2 + len(CATEGORIES))]
    compared = compared_cards(cards)
    base = next(
        (card for card in compared if card["model"] == "lite" and passes(card) == 40 and not fp8_of(card)), None
    )
    for card in compared:
        cells = ["-"]
        if base not in (None, card) and base["seeds"] == card["seeds"]:
            cells = ["{:+.3f} ({:+.3f} to {:+.3f})".format(*result_cards.compare(card, base))]
        cells += ["{:.3f} ({:.3f} to {:.3f})".format(*one) for one in categories(card).values()]
        lines.append(f"| {' | '.join([label(card), *cells])} |")
    return "\n".join(lines)


def categories(card: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Category -> share of right pictures, low, high (95 %, bootstrapped over its prompts)."""
    tags, found = [prompt.tag for prompt in load_prompts(card["prompt_list"])], {}
    for category in CATEGORIES:
        mine = [k for k in range(len(card["verdicts"])) if tags[k % len(tags)] == category]
        marks = [float(card["verdicts"][k]) for k in mine]
        found[category] = paired_interval(marks, [0.0] * len(marks), [k % len(tags) for k in mine])
    return found


def compared_cards(cards: Cards) -> list[Mapping[str, Any]]:
    """The cards of lite models that stand side by side: on the held-out prompts, with what the pictures look like.

    Those drawn in 16 bit are left out: they are there for FP8 to be held against.
    """
    found = [c for c in lite_cards(cards).values() if c["prompt_list"] == HELD_OUT and c.get("appearance")]
    found = [c for c in found if c.get("fp8") or c["dtype"] == "float32"]
    return sorted(found, key=lambda card: (card["model"], fp8_of(card), passes(card)))


def passes(card: Mapping[str, Any]) -> int:
    """Of the transformer, for one picture: guidance takes two a step."""
    consistency = card["sampler"] == "SCMScheduler"  # is told how strongly it is to be guided
    return card["steps"] * (2 if card["guidance"] > 1 and not consistency else 1)


def fp8_of(card: Mapping[str, Any]) -> str:
    """` FP8` when it was drawn in it."""
    return " FP8" if card.get("fp8") else ""


def label(card: Mapping[str, Any]) -> str:
    """`lite-grpo FP8, 10 steps`."""
    return f"{card['model']}{fp8_of(card)}, {_steps(card)}"


def _steps(card: Mapping[str, Any]) -> str:
    return f"{card['steps']} step{'s' * (card['steps'] != 1)}"


def weights_bytes(card: Mapping[str, Any]) -> int:
    """Of the transformer's weights in memory; older cards tell their number and type."""
    size = getattr(torch, card["dtype"]).itemsize
    return card.get("transformer_bytes", card["transformer_parameters"] * size)


def milliseconds(card: Mapping[str, Any], cards: Cards) -> float | None:
    """A picture of this model, from caption to PNG, in the card of speeds that holds it; None where none does."""
    for speed in (one for one in cards.values() if one["kind"] == "speed"):
        for row in speed["rows"]:
            if all(row.get(name) == card.get(name) for name in ("model", "steps", "guidance", "dtype", "fp8")):
                return 1000 * row["seconds"] / row["batch"]
    return None


def _same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(name) == other.get(name) for name in ("weights_sha256", "steps", "guidance", "dtype", "fp8"))


def table2(cards: Cards) -> str:
    """Table 2: the paper's column, the count of this package, and why they differ where they do."""
    counts = cards["counts"]["rows"]
    columns = "model|M parameters, paper|here|TFLOPs, paper|here|img/s|ms|GenEval|ImageReward|HPSv2.1|DPG|note"
    lines = [f"| {columns.replace('|', ' | ')} |", "|" + "---|" * (columns.count("|") + 1)]
    for key, peer in peers.table_rows().items():
        told, found = peer.paper, counts.get(key)
        here = (f"{found['parameters'] / 1e6:,.1f}", f"{found['tflops']:.2f}") if found else ("not counted",) * 2
        cells = [peer.name, f"{told['parameters_m']:,}", here[0], f"{told['tflops']:.2f}", here[1]]
        cells += [f"{told['images_per_second']:.2f}", f"{told['latency_ms']:,}"]
        cells += [f"{told[name]:.2f}" for name in ("geneval", "image_reward", "hpsv21", "dpg")] + [peer.note]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_and_quality(cards: Cards) -> Figure:
    """Speed against quality: the paper's models by its own numbers, areas by parameters; the lite models by cards.

    Lite models stand at pictures a second when all of them were timed in turn, else at passes of the transformer.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained", width_ratios=(2, 1.1, 1.3))
    counts = cards["counts"]["rows"]
    for key, peer in peers.table_rows().items():
        x, y = peer.paper["images_per_second"], peer.paper["geneval"]
        size = counts[key]["parameters"] if key in counts else 1e6 * peer.paper["parameters_m"]
        color = viz.COLORS[3] if key.startswith("e_mmdit") else viz.COLORS[6]
        axes[0].scatter(x, y, s=size / 2e7, color=color, alpha=0.6, linewidths=0)
        place = {"fontsize": 6.5, "ha": "center", "textcoords": "offset points"}
        axes[0].annotate(peer.name, (x, y), xytext=(0, -9 if key == "sdxl" else 5), **place)
    axes[0].set(xscale="log", xlabel="pictures a second, batch 32, one MI300X (paper)", ylabel="GenEval (paper)")
    axes[0].set_title("Table 2: areas are parameters", fontsize=9)
    shown = compared_cards(cards)
    taken = [milliseconds(card, cards) for card in shown]
    speeds = [1000 / ms for ms in taken] if all(taken) else [passes(card) for card in shown]
    names = list(dict.fromkeys(card["model"] + fp8_of(card) for card in shown))
    for number, name in enumerate(names):
        rows = [(x, card) for x, card in zip(speeds, shown, strict=True) if card["model"] + fp8_of(card) == name]
        look = {"color": viz.COLORS[number % len(viz.COLORS)], "marker": "os^DvPX<"[number % 8], "lw": 0.8}
        look |= {"mfc": "white"} if name.endswith(" FP8") else {}
        x, y, low, high = np.array([(x, c["overall"], c["low"], c["high"]) for x, c in rows]).T
        axes[1].errorbar(x, y, [y - low, high - y], capsize=3, label=name, **look)
        for step, (_, card) in enumerate(rows):  # fewest passes first
            middle, low, high = np.array(list(categories(card).values())).T
            place = np.arange(len(middle)) + (number - (len(names) - 1) / 2) * 0.8 / len(names)
            pale = {"alpha": 1 - 0.6 * step / max(1, len(rows)), "markersize": 3.5, "ls": "none"}
            bars = np.maximum([middle - low, high - middle], 0)
            axes[2].errorbar(place, middle, bars, **look, **pale)
    unit = "pictures a second, in turn on one machine" if all(taken) else "passes of the transformer a picture"
    ticks = {} if all(taken) else {"xticks": (1, 2, 4, 10, 20, 40), "xticklabels": (1, 2, 4, 10, 20, 40)}
    axes[1].set(xscale="log", xlabel=unit, ylabel="GenEval-lite", ylim=(0, 1), **ticks)
    axes[1].minorticks_off()  # their labels would lie on those of the ticks
    axes[1].set_title("lite models: cards of this repository", fontsize=9)
    axes[1].legend(frameon=False, fontsize=7, loc="lower right")
    axes[2].set(xticks=range(len(CATEGORIES)), ylim=(0, 1.02), ylabel="GenEval-lite")
    axes[2].set_xticklabels([name.replace("_", "\n") for name in CATEGORIES], fontsize=7)
    axes[2].set_title("by category; paler: more passes", fontsize=9)
    return figure


def steps_and_quality(cards: Cards) -> Figure:
    """GenEval-lite by steps, a line for each lite model in 32 bit; of two cards that of more pictures."""
    lines: dict[tuple[str, float], dict[int, Mapping[str, Any]]] = {}
    for card in sorted(lite_cards(cards).values(), key=lambda card: card["images"]):
        if card["prompt_list"] == HELD_OUT and card["dtype"] == "float32" and not card.get("fp8"):
            lines.setdefault((card["model"], card["guidance"]), {})[card["steps"]] = card
    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    longer = sorted(key for key, found in lines.items() if len(found) > 1)
    for number, (model, guidance) in enumerate(longer):
        found = lines[model, guidance]
        rows = [(steps, c["overall"], c["low"], c["high"]) for steps, c in sorted(found.items())]
        steps, y, low, high = np.array(rows).T
        guided = any(passes(card) > card["steps"] for card in found.values())
        style = viz.LINE_STYLES[number % len(viz.LINE_STYLES)]
        look = {"color": viz.COLORS[number % len(viz.COLORS)], "marker": "os^Dv"[number % 5], "ls": style, "ms": 4}
        label = f"{model}, guidance {guidance:g}: two passes a step" if guided else model
        axis.errorbar(steps, y, [y - low, high - y], capsize=3, label=label, **look)
    ticks = (1, 2, 4, 8, 10, 20)
    axis.set(xscale="log", xlabel="steps", ylabel="GenEval-lite", ylim=(0, 1), xticks=ticks, xticklabels=ticks)
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def shown_cards(cards: Cards) -> dict[str, Mapping[str, Any]]:
    """Those that the figure is made from."""
    return {name: card for name, card in cards.items() if card["kind"] in ("counts", "speed", "geneval_lite")}


def lite_cards(cards: Cards) -> dict[str, Mapping[str, Any]]:
    """Those of them that score a lite model."""
    return {name: card for name, card in cards.items() if card["kind"] == "geneval_lite"}


def save_figure(cards: Cards) -> Path:
    """Draws the figure into `figures/`; its entry in the ledger names the cards by their hashes."""
    alt = "Pictures a second against GenEval for sixteen models, E-MMDiT at the right; GenEval-lite of lite models, "
    alt += "overall and by category."
    params = {"cards": result_cards.fingerprint(shown_cards(cards))}
    figure = speed_and_quality(cards)
    plt.close(figure)
    return viz.save_figure(figure, FIGURE, source="nitro-e tables", params=params, seed=None, alt=alt)
