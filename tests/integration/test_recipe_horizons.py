"""The study of orders over batch, length and noise: small runs, and what it reads off them."""

import re
import sys

import numpy as np
import pytest

from tests.integration.recipes import import_recipe

horizons = import_recipe("ordering")["horizons"]
widths = import_recipe("llama_pretrain")["widths"]
harness, llama, records, tables = (
    sys.modules[f"study.{name}"] for name in ("harness", "byte_llama", "records", "tables")
)
TEXT = np.frombuffer(b"Shall I compare thee to a summer's day? " * 40, dtype=np.uint8)


@pytest.fixture(autouse=True)
def _own_text(monkeypatch):
    monkeypatch.setattr(llama, "texts", lambda corpus: (TEXT, TEXT))


def test_a_small_study_ends_with_a_table_and_a_figure(tmp_path, capsys):
    out, figure = str(tmp_path / "runs.jsonl"), tmp_path / "gap.png"
    arms = ["pre_polar", "post_polar", "polar_only", "adamw"]
    few = ["--cells", "64x20", "--noise-scale", "1", "--seeds", "1", "2", "--budget", "1"]
    few += ["--arms", *arms]
    horizons.main(["run", "--out", out, *few])
    assert len(capsys.readouterr().out.splitlines()) == 3 * len(arms)
    horizons.main(["run", "--out", out, *few])
    assert capsys.readouterr().out == ""  # nothing is trained twice
    horizons.main(["report", "--out", out, "--figure", str(figure)])
    table = capsys.readouterr().out
    assert all(f"| {arm} |" in table for arm in arms)
    assert "noise white, noise_scale 1" in table
    assert re.search(
        r"\| 64 × 20 \| 1 \| .* \| [+-]\d\.\d+ ± \d\.\d+ \| – \|$", table.splitlines()[-1]
    )
    assert figure.stat().st_size > 10_000


def test_the_gap_is_to_the_better_order_of_the_search():
    # On seed 0 post_polar is the better of the other two, on the fresh seeds it is not.
    losses = {"pre_polar": (1, 1.0), "post_polar": (2, 1.3), "polar_only": (3, 1.2)}
    kept, plans = records.Records(), []
    for name, (searched, fresh) in losses.items():
        plan = harness.Plan(name, horizons.ARMS[name], {"steps": 1}, budget=1)
        plans.append(plan)
        for seed in range(4):
            loss = fresh + 0.1 * seed if seed else searched
            kept.add(plan.run(plan.start, seed), {"loss": loss, "seconds": 1.0})
    found = horizons.gap(tables.rows(kept, plans))
    assert found.mean == pytest.approx(0.3)
    assert found.error == pytest.approx(0, abs=1e-12)  # pairs: what seeds have in common cancels
    assert horizons.gap(tables.rows(kept, plans[:2])) is None


@pytest.mark.parametrize("study", [(horizons, "--width"), (widths, "--widths")])
def test_a_width_without_whole_heads_is_refused(study, tmp_path, capsys):
    module, option = study
    with pytest.raises(SystemExit):
        module.main(["run", "--out", str(tmp_path / "runs.jsonl"), option, "40"])
    assert "'40' is no multiple of 16, the width of a head." in capsys.readouterr().err


def test_widths_are_compared_by_rule(tmp_path, capsys):
    out = str(tmp_path / "widths.jsonl")
    few = ["--widths", "16", "32", "--cell", "64x4", "--seeds", "1", "--budget", "2"]
    widths.main(["run", "--out", out, *few])
    assert len(capsys.readouterr().out.splitlines()) == 2 * 3 * (2 + 1)
    widths.main(["report", "--out", out, "--figure", str(tmp_path / "widths.png")])
    report = capsys.readouterr().out
    assert "width 16" in report
    assert "width 32" in report
    assert (tmp_path / "widths.png").stat().st_size > 10_000
