"""The ledger of claims: every entry whole, every command there, and what the published table itself says."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import typer

from nitro_e_lite.cli.app import app
from nitro_e_lite.evaluation import claims

ROOT = Path(__file__).resolve().parents[1]
ALL = claims.load_claims()


def test_every_source_has_claims_and_no_claim_stands_twice():
    assert {one.source for one in ALL} == set(claims.sources())
    assert max(Counter((one.source, one.claim) for one in ALL).values()) == 1
    assert sum(claims.count_verdicts(ALL).values()) == len(ALL)
    assert f"of {len(ALL)} claims of four articles" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert claims.load_claims("S3") == [one for one in ALL if one.source == "S3"]
    with pytest.raises(ValueError, match="source: 'S9'"):
        claims.load_claims("S9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "maybe"}, "verdict 'maybe' is not one of"),
        ({"here": " "}, "here is empty"),
        ({"command": "-", "verdict": "holds"}, "holds needs a command"),
    ],
)
def test_an_entry_that_says_too_little_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        claims.Claim(
            **{"claim": "a", "source": "N", "here": "b", "command": "nitro-e count", "verdict": "holds"} | change
        )


def test_every_command_of_the_ledger_exists():
    for command in {one.command for one in ALL} - {"-"}:
        words = shlex.split(command)
        if words[0] == "nitro-e":
            found, words = typer.main.get_command(app), words[1:]
            while words and words[0] in getattr(found, "commands", {}):
                found = found.commands[words.pop(0)]
            assert not hasattr(found, "commands"), command
            options = {option for parameter in found.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, command
        elif words[0] == "pytest":
            text = (ROOT / words[1]).read_text(encoding="utf-8")
            names = re.findall(r"def (test_\w+)", text)
            for part in words[3].split(" or ") if len(words) > 2 else []:
                assert any(part in name for name in names), command
        else:
            assert (ROOT / command).is_file(), command
