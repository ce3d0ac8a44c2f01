"""The ledger of claims: every entry whole, every command there, and what the published table itself says."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import typer

from nitro_e_lite.cli.app import app
from nitro_e_lite.course import playground
from nitro_e_lite.evaluation import claims
from nitro_e_lite.evaluation.peers import table_rows
from nitro_e_lite.stats import interval

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


def test_what_the_ledger_says_of_losses_is_what_their_arms_came_to():
    arms, said = playground.read()["arms"], {one.claim: one.here for one in ALL}

    def reached(stage, arm):
        return "{:.3f} ± {:.3f}".format(*interval(arms[stage][arm]["scores"]))

    alone, fewer = (
        said["adversarial training alone collapses"],
        said["consistency models alone fall off below four steps"],
    )
    assert reached("distill", "adversary") in alone and reached("sprint", "adversary, 1 step") in alone
    assert f"{arms['sprint']['before, 1 step']['scores'][0]:.3f}, 0.201" in alone
    assert f"({arms['distill']['before']['scores'][0]:.3f} before" in alone
    assert all(reached("sprint", f"consistency, {steps}") in fewer for steps in ("1 step", "2 steps"))
    both = [interval(arms["sprint"][f"both, {steps}"]["scores"])[0] for steps in ("2 steps", "1 step")]
    assert "({:.3f} and {:.3f})".format(*both) in fewer


def test_what_contradicts_its_table_does_so_in_the_table():
    """Figures that the ledger holds against an article, looked up in the rows of Table 2."""
    rows = {key: peer.paper for key, peer in table_rows().items()}
    base, few, rewards, sana = (rows[key] for key in ("e_mmdit", "e_mmdit_4step", "e_mmdit_grpo", "sana_600m"))
    assert [row["latency_ms"] for row in (base, few, rewards)] == [398, 99, 398]  # the article: 498, 99, 512
    assert [row["geneval"] for row in (base, few, rewards)] == [0.66, 0.67, 0.72]  # 0.68, 0.66, 0.72
    assert rewards["images_per_second"] == base["images_per_second"] == 18.83  # 18.2
    assert base["images_per_second"] / sana["images_per_second"] == pytest.approx(3.07, abs=0.005)  # 4
    assert base["hpsv21"] == rewards["hpsv21"] == 29.82  # 3.2 more
    contradicted = [claim.here for claim in ALL if claim.verdict == "contradicts its own table"]
    said = " ".join(contradicted)
    assert len(contradicted) == 5 and all(one in said for one in ("398 and 99", "0.66, 0.67", "18.83", "3.07", "29.82"))
