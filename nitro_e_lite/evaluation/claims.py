"""Every claim of the articles about these models, and what became of it here.

`claims.json` is the one ledger: the claim, who made it, what was found here, by which command, and a verdict. README
and notebooks read it. "Not run" and "cannot be tested here" are verdicts, and so is "contradicts its own table": some
articles disagree with the table that they quote, and then the table is what counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nitro_e_lite.errors import InvalidValue
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


def load_claims(source: str | None = None, path: Path = LEDGER) -> list[Claim]:
    """The claims of one source, or of all, in order.

    Raises:
        ValueError: an unknown source, or a ledger with an entry that is none.
    """
    ledger = read_json(path)
    if source is not None and source not in ledger["sources"]:
        raise InvalidValue(f"source: {source!r} is not one of {', '.join(ledger['sources'])}")
    try:
        claims = [Claim(**entry) for entry in ledger["claims"]]
    except TypeError as error:
        raise InvalidValue(f"{path}: {error}") from None
    if strangers := {claim.source for claim in claims} - set(ledger["sources"]):
        raise InvalidValue(f"{path}: no such source: {', '.join(sorted(strangers))}")
    return [claim for claim in claims if source in (None, claim.source)]


def sources() -> dict[str, str]:
    """Key of a source -> what it is."""
    return read_json(LEDGER)["sources"]


def count_verdicts(claims: Sequence[Claim]) -> dict[str, int]:
    """Verdict -> how many claims have it, in the order of `VERDICTS`."""
    found = Counter(claim.verdict for claim in claims)
    return {verdict: found[verdict] for verdict in VERDICTS}
