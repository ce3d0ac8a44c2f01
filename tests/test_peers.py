"""Table 2: counts from configurations against the paper's column, and the clock on tiny peers."""

import dataclasses

import pytest
import torch

from nitro_e_lite import runtime
from nitro_e_lite.evaluation import cards, claims, gpu_cells, peers, tables

ALL = peers.load_peers()
ROWS = peers.table_rows()
EXPLAINED = {"lumina_2", "hunyuan_dit", "playground_25", "pixart_sigma"}  # their TFLOPs differ; `note` says why


def test_the_table_has_its_sixteen_rows_with_a_source_each():
    assert len(ROWS) == 16
    assert all(one.source and one.date for one in ALL.values())
    assert [key for key, one in ROWS.items() if one.cls is None] == ["microdit"]
    assert peers.count(ROWS["microdit"]) is None and "no class" in ROWS["microdit"].note
    with pytest.raises(ValueError, match="MicroDiT: not counted"):
        peers.build(ROWS["microdit"])


def test_parameters_and_tflops_are_the_papers_or_the_difference_is_explained():
    """The paper counts products inside attention too: with them all rows but those of `EXPLAINED` agree."""
    for key, one in ROWS.items():
        if (counts := peers.count(one)) is None:
            continue
        print(f"{one.name:18} {one.paper['parameters_m']:7} {counts.parameters / 1e6:9.1f} {counts.tflops:8.3f}")
        assert counts.parameters / 1e6 == pytest.approx(one.paper["parameters_m"], rel=0.006), one.name
        same = abs(counts.tflops - one.paper["tflops"]) <= 0.0051
        assert same != (key in EXPLAINED) and (same or one.note), one.name
        stored = cards.load()["counts"]["rows"][key]
        assert (counts.parameters, counts.tflops) == (stored["parameters"], pytest.approx(stored["tflops"])), one.name


def test_sd35_has_its_real_size():
    counts = peers.count(ALL["sd35_large"])
    assert counts.parameters == pytest.approx(8.06e9, rel=0.01) and set(peers.IN_FP8) <= set(ALL)


def test_hunyuans_figure_is_that_of_1024_px():
    large = ROWS["hunyuan_dit"].inputs | {"hidden_states": ["B", 4, 128, 128]}
    counts = peers.count(dataclasses.replace(ROWS["hunyuan_dit"], inputs=large))
    assert counts.tflops == pytest.approx(ROWS["hunyuan_dit"].paper["tflops"], abs=0.005)


@pytest.fixture
def tiny():
    size = dict(
        in_channels=4, num_attention_heads=2, attention_head_dim=16, caption_channels=32, block_groups=(1, 1, 1)
    )
    inputs = {"hidden_states": ["B", 4, 16, 16], "encoder_hidden_states": ["B", 16, 32], "timestep": ["B"]}
    draws = {"text": "text", "decoder": "decoder", "steps": 20, "guided": True}
    one = dataclasses.replace(ROWS["e_mmdit"], config=size, inputs=inputs, draws=draws)
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vae = dict(latent_channels=4, block_out_channels=[8], down_block_types=["DownEncoderBlock2D"], norm_num_groups=1)
    vae |= {"up_block_types": ["UpDecoderBlock2D"], "layers_per_block": 1}
    return {
        "sana_600m": dataclasses.replace(one, key="sana_600m"),
        "few": dataclasses.replace(one, key="few", draws={**draws, "steps": 4, "guided": False}),
        "text": dataclasses.replace(ALL["llama_3_2_1b"], key="text", config=text),
        "decoder": dataclasses.replace(ALL["sd_vae"], key="decoder", config=vae, inputs={"z": ["B", 4, 16, 16]}),
    }


def test_peers_are_timed_by_parts_and_compared(tiny, monkeypatch):
    monkeypatch.setattr(peers, "count", lambda peer: peers.Counts(0, 10**6, 0))
    rows = list(peers.time_peers(tiny, 2, "cpu", "bfloat16", repeats=1))
    assert [row["key"] for row in rows] == ["sana_600m", "few"] and all(row["batch"] == 2 for row in rows)
    for row in rows:
        assert row["in_all"] == pytest.approx(row["text"] + row["steps"] * row["pass"] + row["decoder"])
        assert row["images_per_second"] == pytest.approx(2 / row["in_all"]) and row["dtype"] == "bfloat16"
        assert row["peak_share"] * row["pass"] > 0  # of what a large product reaches on this machine
    found = peers.ratios(rows)
    assert found["sana_600m"] == {"end_to_end": 1, "transformer": 1}
    assert found["few"]["transformer"] > 2  # a fifth of the passes, half of the rows
    with pytest.raises(ValueError, match="sana_600m is not among them"):
        peers.ratios(rows[1:])


def test_building_a_peer_leaves_the_default_number_type(tiny):
    model = peers.build(tiny["few"], "cpu", torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32
    inputs = peers.make_inputs(tiny["few"], 3, "cpu", torch.bfloat16)
    assert [tuple(value.shape) for value in inputs.values()] == [(3, 4, 16, 16), (3, 16, 32), (3,)]


def test_benchmark_peers_prints_and_writes_a_card(tiny, monkeypatch, tmp_path):
    import json

    from typer.testing import CliRunner

    from nitro_e_lite.cli.app import app

    monkeypatch.setattr(peers, "load_peers", lambda: tiny)
    words = ["benchmark", "--peers", "--device", "cpu", "--repeats", "1"]
    found = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "peers.json")])
    assert found.exit_code == 0 and "times Sana-0.6B" in found.stdout, found.output
    card = json.loads((tmp_path / "peers.json").read_text())
    cards.check(card)
    assert card["ratios"]["1"]["sana_600m"]["end_to_end"] == 1 and len(card["rows"]) == 2
    monkeypatch.setattr(peers, "IN_FP8", ("few",))
    found = CliRunner().invoke(app, [*words, "--fp8", "--json"])
    (row,) = json.loads(found.stdout)["rows"]
    assert row["rung"] == "weight_only" and row["ratio"] == pytest.approx(row["pass"] / row["pass_fp8"])
    assert 0.5 < row["bytes"] < 0.95 and "hundreds of times slower" in row["reasons"][0]
    for more in (["--fp8", "--dtype", "float32"], ["--steps", "4"], ["--model", "elsewhere"]):
        assert CliRunner().invoke(app, [*words, *more]).exit_code == 2
    for more in (["--transformer", "smoke"], ["--beside", "lite@1"]):
        assert CliRunner().invoke(app, ["benchmark", "--compile", *more]).exit_code == 2


@pytest.fixture
def small_cells(tiny, monkeypatch):
    """The cells of an accelerator with small models, 2 pictures for 32, passes and compilers left out."""
    text = tiny["text"].config | {"vocab_size": 512}
    decoder = {"latent_channels": 4, "attention_head_dim": 8}
    for side in ("encoder", "decoder"):
        decoder |= {f"{side}_block_types": "ResBlock", f"{side}_block_out_channels": (8, 8)}
        decoder |= {f"{side}_layers_per_block": (1, 1), f"{side}_qkv_multiscales": ((), ())}
    one = tiny["sana_600m"]
    known = tiny | {key: dataclasses.replace(one, key=key) for key in ("e_mmdit", "e_mmdit_4step", "sd35_large")}
    known["llama_3_2_1b"] = dataclasses.replace(tiny["text"], config=text)
    inputs = {"z": ["B", 4, 16, 16]}
    known["dc_ae_f32"] = dataclasses.replace(ALL["dc_ae_f32"], config=decoder, inputs=inputs)
    monkeypatch.setattr(peers, "count", lambda peer: peers.Counts(0, 10**6, 0))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    seconds = iter(range(3, 10**6))
    monkeypatch.setattr(peers, "_time", lambda *_: next(seconds) / 7)
    timed = gpu_cells.time_pipeline

    def few(pipeline, sampler, batches, repeats):
        return [row | {"batch": batches[0]} for row in timed(pipeline, sampler, [min(2, *batches, 2)], repeats)]

    monkeypatch.setattr(gpu_cells, "time_pipeline", few)
    return known


def test_one_command_fills_every_cell_that_waits_for_an_accelerator(small_cells, tmp_path):
    cells = gpu_cells.Cells(tmp_path / "cards", torch.device("cpu"), small_cells, repeats=1)
    lines = list(gpu_cells.measure(cells))
    assert len(lines) == len(gpu_cells.CELLS) and all(line.endswith(" s") for line in lines), lines
    found = cards.load(tmp_path / "cards")
    assert found.keys() == {"drawing_gpu", "peers_gpu", "peers_gpu_compiled", "fp8_gpu"}
    drawn = found["drawing_gpu"]["rows"]
    keys = ("steps", "batch", "compiled")
    assert [tuple(row[key] for key in keys) for row in drawn] == [
        (steps, batch, compiled) for compiled in (False, True) for batch in (32, 1) for steps in (20, 4)
    ]
    assert set(found["peers_gpu"]["ratios"]) == {"1", "32"} and found["peers_gpu_compiled"]["compiled"] is True
    assert {(row["key"], row["batch"], row["compiled"]) for row in found["fp8_gpu"]["rows"]} == {
        (key, batch, compiled) for key in peers.IN_FP8 for batch in (1, 8, 32) for compiled in (False, True)
    }
    every = cards.load() | found  # the table and the ledger read all of them
    text, here = tables.results_table(every), " ".join(claim.here for claim in claims.load_claims(cards=every))
    for row in drawn:
        assert f"batch {row['batch']}{', compiled' * row['compiled']}: {row['images_per_second']:.1f}/s, " in text
    for row in found["fp8_gpu"]["rows"]:
        assert f": {row['ratio']:.2f}, {row['memory']:.2f}" in text
    assert text.count("times as fast as Sana-0.6B, random weights, batch 32, ") == 2 and "bfloat16, compiled, " in text
    (first,) = [row for row in found["fp8_gpu"]["rows"] if row["cell"] == "sd35_large, batch 8, compiled"]
    ratio = found["peers_gpu"]["ratios"]["32"]["e_mmdit"]["end_to_end"]
    said = [f"{drawn[0]['images_per_second']:.1f} in 20 steps", f"{drawn[2]['seconds']:.3f} s in 20 steps"]
    for one in (*said, f"{ratio:.2f} times end to end", f"compiled, weight_only: {first['ratio']:.2f}"):
        assert one in here
    (claim,) = [one for one in claims.load_claims(cards=every) if one.claim.startswith("3.07 times the throughput")]
    assert claim.verdict == ("holds" if ratio >= 3.07 else "does not hold")
    faster = {name: dict(card) for name, card in every.items()}
    for ratio, verdict in ((None, "not run"), (1.9, "holds"), (1.2, "does not hold")):  # of products in FP8 alone
        rows = [row | ({"ratio_dynamic": ratio} if ratio else {}) for row in found["fp8_gpu"]["rows"]]
        faster["fp8_gpu"] = found["fp8_gpu"] | {"rows": rows}
        (claim,) = [one for one in claims.load_claims(cards=faster) if one.claim == "1.8 times the throughput"]
        assert claim.verdict == verdict


def test_what_an_accelerator_has_measured_stays_when_it_fails_or_time_is_over(small_cells, tmp_path, monkeypatch):
    work = gpu_cells.Cells.beside

    def fails(self, batch, compiled):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    few = ((gpu_cells.Cells.draw, 1, False), (fails, 32, False), (work, 1, False))
    monkeypatch.setattr(gpu_cells, "CELLS", few)
    cells = gpu_cells.Cells(tmp_path, torch.device("cpu"), small_cells, repeats=1)
    lines = list(gpu_cells.measure(cells))
    assert lines[1] == "fails, batch 32: failed, OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert cards.load(tmp_path).keys() == {"drawing_gpu", "peers_gpu"}
    every = claims.load_claims(cards=cards.load() | cards.load(tmp_path))
    here = {one.claim[:8]: one.here for one in every}
    assert here["18.8 pic"] == "no accelerator was at hand" and "s in 20 steps" in here["latency "]
    late = list(gpu_cells.measure(gpu_cells.Cells(tmp_path / "late", torch.device("cpu"), small_cells, minutes=-1)))
    assert all("not all of it: -1 minutes are over" in late[k] for k in (0, 2)) and not (tmp_path / "late").exists()


def test_the_cells_of_an_accelerator_go_on_with_what_is_missing(small_cells, tmp_path, monkeypatch):
    """Of a leased machine there are ten minutes at a time; a model that fails costs its own row."""
    monkeypatch.setattr(gpu_cells, "CELLS", ((gpu_cells.Cells.beside, 32, False), (gpu_cells.Cells.in_fp8, 8, False)))
    build, broken = peers.build, {"e_mmdit"}

    def breaks(peer, *words, **more):
        if peer.key in broken:
            raise RuntimeError("out of luck")
        return build(peer, *words, **more)

    monkeypatch.setattr(peers, "build", breaks)
    here = torch.device("cpu")
    lines = list(gpu_cells.measure(gpu_cells.Cells(tmp_path, here, small_cells, repeats=1)))
    assert [": failed, RuntimeError: out of luck" in line for line in lines] == [True, True]
    before = cards.load(tmp_path)
    known = [row["key"] for row in before["peers_gpu"]["rows"]]
    assert known[0] == peers.REFERENCE and "e_mmdit_4step" in known and "e_mmdit" not in known
    assert [row["cell"] for row in before["fp8_gpu"]["rows"]] == ["sd35_large, batch 8"]
    assert tables._against_sana(before) == []  # what a row of README needs is not there yet, and nothing crashes
    with pytest.raises(ValueError, match="has repeats=1, this run 3; name another folder"):
        gpu_cells.Cells(tmp_path, here, small_cells, repeats=3)
    broken.clear()
    again = list(gpu_cells.measure(gpu_cells.Cells(tmp_path, here, small_cells, repeats=1)))
    assert all(line.endswith(" s") for line in again)
    after = cards.load(tmp_path)
    assert [row["key"] for row in after["peers_gpu"]["rows"]] == [*known, "e_mmdit"]
    assert after["peers_gpu"]["ratios"]["32"].keys() == {*known, "e_mmdit"}
    assert after["fp8_gpu"]["rows"][:1] == before["fp8_gpu"]["rows"] and len(after["fp8_gpu"]["rows"]) == 2
    assert len(tables._against_sana(after)) == 1
    broken.add(peers.REFERENCE)  # its failure hid all others, and itself
    alone = list(gpu_cells.measure(gpu_cells.Cells(tmp_path / "alone", here, small_cells, repeats=1)))
    assert ": failed, RuntimeError: out of luck" in alone[0]
    rows = cards.load(tmp_path / "alone")["peers_gpu"]["rows"]
    assert [row["key"] for row in rows][:2] == list(peers.FEW) and not tables._against_sana(
        cards.load(tmp_path / "alone")
    )
    monkeypatch.setattr(gpu_cells.runtime, "device_name", lambda device: "another one")
    with pytest.raises(ValueError, match="has device_name=.*'another one'; name another folder or delete it"):
        gpu_cells.Cells(tmp_path, here, small_cells, repeats=1)


def test_the_command_of_an_accelerator(small_cells, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from nitro_e_lite.cli.app import app

    monkeypatch.setattr(peers, "load_peers", lambda: small_cells)
    monkeypatch.setattr(gpu_cells, "CELLS", ((gpu_cells.Cells.in_fp8, 1, False),))
    words = ["benchmark", "--gpu", "--repeats", "1", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["nitro-e", *words, "--out", str(tmp_path)])
    found = CliRunner().invoke(app, [*words, "--out", str(tmp_path)])
    assert found.exit_code == 0 and ": 1" in found.stdout, found.output
    assert cards.load(tmp_path)["fp8_gpu"]["command"] == "nitro-e benchmark --gpu --repeats 1 --device cpu"
    folder = ["--out", str(tmp_path)]
    assert CliRunner().invoke(app, [*words, *folder]).exit_code == 0  # all is there
    with monkeypatch.context() as broken:
        broken.setattr(gpu_cells, "CELLS", ((gpu_cells.Cells.in_fp8, 2, False),))
        broken.setattr(peers, "build", None)
        failed = CliRunner().invoke(app, [*words, *folder])
    assert failed.exit_code == 2 and "no cell could be measured" in failed.stderr  # whatever the folder holds
    for more in (
        [],
        [*folder, "--peers"],
        [*folder, "--batch", "2"],
        [*folder, "--steps", "4"],
        [*folder, "--model", "x"],
    ):
        assert CliRunner().invoke(app, [*words, *more]).exit_code == 2
    assert CliRunner().invoke(app, ["benchmark", "--gpu", "--repeats", "0", "--device", "cpu", *folder]).exit_code == 2
    monkeypatch.setattr(runtime, "pick_device", lambda device: torch.device("cpu"))
    nowhere = CliRunner().invoke(app, ["benchmark", "--gpu", *folder])
    assert nowhere.exit_code == 2 and "there is no accelerator here" in nowhere.stderr
