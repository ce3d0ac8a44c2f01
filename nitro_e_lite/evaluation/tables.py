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
from nitro_e_lite.files import read_json
from nitro_e_lite.inference.loading import load_transformer
from nitro_e_lite.model import fp8
from nitro_e_lite.model.flops import build_on_meta, model_config
from nitro_e_lite.model.fp8_ladder import Choice

ROWS = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- written by nitro-e tables -->", "<!-- end of what nitro-e tables wrote -->"
FIGURE = "speed_and_quality"
Cards = Mapping[str, Mapping[str, Any]]


def count_all() -> dict[str, Any]:
    """What can be counted without drawing: every row of Table 2, the text encoders, and the bytes in FP8.

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
    return {"rows": rows, "fp8": ratios}


def results_table(cards: Cards) -> str:
    """The rows of `results.json`, filled in.

    Raises:
        ValueError: a row names a card or a field that is not there.
    """
    lines = ["| what | paper | measured or computed here | command |", "|---|---|---|---|"]
    for row in read_json(ROWS)["rows"]:
        try:
            here, command = (row[name].format(**cards) for name in ("here", "command"))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise InvalidValue(f"{ROWS.name}, {row['what']!r}: there is no card or field {error}") from None
        lines.append(f"| {row['what']} | {row['paper']} | {here} | `{command}` |")
    return "\n".join(lines)


def rebuild(readme: str, cards: Cards) -> str:
    """README's text with the table rebuilt between its two markers.

    Raises:
        ValueError: the markers are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InvalidValue(f"README.md: lacks {BEGIN if not begin else END}")
    return f"{before}{BEGIN}\n{results_table(cards)}\n\n{lite_models(cards)}\n{END}{after}"


def lite_models(cards: Cards) -> str:
    """The lite models side by side: how many passes of the transformer a picture takes, what is right, how it looks."""
    columns = "model passes right minus_lite new_compositions reader preference diversity KID command".split()
    columns = [name.replace("_", " ") for name in columns]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    scored = lite_cards(cards)
    for card in sorted(scored.values(), key=lambda card: (card["model"], passes(card), bool(card.get("fp8")))):
        if card["prompt_list"] != "held_out_prompts" or not card.get("appearance"):
            continue
        seen, gap = card["appearance"], None
        if (base := scored.get("lite")) not in (None, card) and base["seeds"] == card["seeds"]:
            gap = result_cards.compare(card, base)  # picture by picture
        new = next((one for one in scored.values() if _same_model(one, card) and one is not card), None)
        cells = [f"{card['model']}, {card['steps']} steps{', FP8' * bool(card.get('fp8'))}", str(passes(card))]
        cells += [f"{card['overall']:.3f} ({card['low']:.3f} to {card['high']:.3f})"]
        cells += ["{:+.3f} ({:+.3f} to {:+.3f})".format(*gap) if gap else "-"]
        cells += [f"{new['overall']:.3f} ({new['low']:.3f} to {new['high']:.3f})" if new else "-"]
        cells += [f"{seen['reader']:.3f}", f"{seen['preference']:.2f}", f"{seen['diversity']:.3f}"]
        cells += [f"{1000 * seen['kid'][0]:.1f} ± {1000 * seen['kid'][1]:.1f}", f"`{card['command']}`"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def passes(card: Mapping[str, Any]) -> int:
    """Of the transformer, for one picture: guidance takes two a step."""
    return card["steps"] * (2 if card["guidance"] > 1 else 1)


def _same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(name) == other.get(name) for name in ("weights_sha256", "steps", "guidance", "dtype", "fp8"))


def table2(cards: Cards) -> str:
    """Table 2: the paper's column, the count of this package, and why they differ where they do."""
    counts = cards["counts"]["rows"]
    lines = ["| model | M parameters, paper | here | TFLOPs, paper | here | img/s | GenEval | note |", "|" + "---|" * 8]
    for key, peer in peers.table_rows().items():
        told, found = peer.paper, counts.get(key)
        here = (f"{found['parameters'] / 1e6:,.1f}", f"{found['tflops']:.2f}") if found else ("not counted",) * 2
        cells = [peer.name, f"{told['parameters_m']:,}", here[0], f"{told['tflops']:.2f}", here[1]]
        cells += [f"{told['images_per_second']:.2f}", f"{told['geneval']:.2f}", peer.note]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_and_quality(cards: Cards) -> Figure:
    """Speed against quality: the paper's models by its own numbers, areas by parameters; the lite models by cards."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", width_ratios=(2, 1))
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
    shown = [card for card in lite_cards(cards).values() if card["prompt_list"] == "held_out_prompts"]
    for color, marker, model in zip(viz.COLORS, "os^Dv", sorted({card["model"] for card in shown}), strict=False):
        points = sorted((passes(c), c["overall"], c["low"], c["high"]) for c in shown if c["model"] == model)
        x, y, low, high = np.array(points).T
        axes[1].errorbar(x, y, [y - low, high - y], fmt=f"{marker}-", color=color, capsize=3, lw=0.8, label=model)
    axes[1].set(xscale="log", xlabel="passes of the transformer a picture", ylabel="GenEval-lite", ylim=(0, 1))
    axes[1].set(xticks=(1, 2, 4, 10, 20, 40), xticklabels=(1, 2, 4, 10, 20, 40))
    axes[1].set_title("lite models: cards of this repository", fontsize=9)
    axes[1].legend(frameon=False, fontsize=7, loc="lower right")
    return figure


def lite_cards(cards: Cards) -> dict[str, Mapping[str, Any]]:
    """Those of them that score a lite model."""
    return {name: card for name, card in cards.items() if card["kind"] == "geneval_lite"}


def save_figure(cards: Cards) -> Path:
    """Draws the figure into `figures/`; its entry in the ledger names the cards by their hashes."""
    shown = {"counts": cards["counts"], **lite_cards(cards)}
    alt = "Pictures a second against GenEval for sixteen models, E-MMDiT at the right; GenEval-lite of lite models."
    params = {"cards": result_cards.fingerprint(shown)}
    figure = speed_and_quality(cards)
    plt.close(figure)
    return viz.save_figure(figure, FIGURE, source="nitro-e tables", params=params, seed=None, alt=alt)
