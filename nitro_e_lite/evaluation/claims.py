"""Every claim of the articles about these models, and what became of it here.

`claims.json` is the one ledger: the claim, who made it, what was found here, by which command, and a verdict. README
and notebooks read it. "Not run" and "cannot be tested here" are verdicts, and so is "contradicts its own table": some
articles disagree with the table that they quote, and then the table is what counts.

Numbers that were measured here stand in result cards, not in the ledger: `{card.field:format}` in `here` is filled
from them (`cards.fill`). An entry may hold `once`, a list: the first whose cards are all there takes the place of
`here`, and its `values`, all of them within `bounds`, then decide between "holds" and "does not hold".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.evaluation import cards as result_cards
from nitro_e_lite.files import read_json

LEDGER = Path(__file__).with_suffix(".json")
VERDICTS = ("holds", "does not hold", "contradicts its own table", "not run", "cannot be tested here")


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        claim: what is said.
        source: who says it, a key of the ledger's `sources`.
        here: what was found, or what is missing.
        command: that finds it; "-" when there is none.
        verdict: one of `VERDICTS`.
    """

    claim: str
    source: str
    here: str
    command: str
    verdict: str

    def __post_init__(self):
        if empty := [name for name, value in vars(self).items() if not value.strip()]:
            raise InvalidValue(f"claim {self.claim!r}: {empty[0]} is empty")
        if self.verdict not in VERDICTS:
            raise InvalidValue(f"claim {self.claim!r}: verdict {self.verdict!r} is not one of {', '.join(VERDICTS)}")
        if (self.command == "-") and self.verdict in ("holds", "does not hold"):
            raise InvalidValue(f"claim {self.claim!r}: {self.verdict} needs a command that shows it")


def load_claims(
    source: str | None = None, path: Path = LEDGER, cards: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Claim]:
    """The claims of one source, or of all, in order.

    Args:
        source: a key of the ledger's `sources`.
        path: of the ledger.
        cards: what its numbers are read from; those of this repository when not given.

    Raises:
        ValueError: an unknown source, or a ledger with an entry that is none, or that names no card there is.
    """
    ledger, cards = read_json(path), result_cards.load() if cards is None else cards
    if source is not None and source not in ledger["sources"]:
        raise InvalidValue(f"source: {source!r} is not one of {', '.join(ledger['sources'])}")
    try:
        claims = [Claim(**_filled(entry, cards)) for entry in ledger["claims"]]
    except TypeError as error:
        raise InvalidValue(f"{path}: {error}") from None
    if strangers := {claim.source for claim in claims} - set(ledger["sources"]):
        raise InvalidValue(f"{path}: no such source: {', '.join(sorted(strangers))}")
    return [claim for claim in claims if source in (None, claim.source)]


def _filled(entry: Mapping[str, Any], cards: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """An entry of the ledger with its numbers."""
    found = dict(entry)
    ready = [once for once in found.pop("once", []) if result_cards.can_fill(once["here"], cards)]
    for once in ready[:1]:
        found["here"] = once["here"]
        if "values" in once and all(result_cards.can_fill(f"{{{value}}}", cards) for value in once["values"]):
            low, high = once["bounds"]
            inside = all(low <= result_cards.lookup(cards, value) <= high for value in once["values"])
            found["verdict"] = "holds" if inside else "does not hold"
    return found | {"here": result_cards.fill(found["here"], cards)}


def sources() -> dict[str, str]:
    """Key of a source -> what it is."""
    return read_json(LEDGER)["sources"]


def count_verdicts(claims: Sequence[Claim]) -> dict[str, int]:
    """Verdict -> how many claims have it, in the order of `VERDICTS`."""
    found = Counter(claim.verdict for claim in claims)
    return {verdict: found[verdict] for verdict in VERDICTS}
