"""Images, speech and recommendation: what is held out, what is asked, and a small run of each."""

import sys

import pytest
import torch

from tests.integration.recipes import import_recipe

recipe = import_recipe("domains")
compare, recommendation, speech, training, vision = (
    recipe[name] for name in ("compare", "recommendation", "speech", "training", "vision")
)
domain_of, Run = training.domain_of, sys.modules["study.records"].Run


@pytest.mark.full
def test_a_quick_study_trains_every_domain_and_tells_what_is_counted(tmp_path, capsys):
    out = str(tmp_path / "runs.jsonl")
    few = ["--out", out, "--arms", "adamw", "muon"]
    compare.main(["run", "--quick", "--seeds", "1", *few])
    assert len(capsys.readouterr().out.splitlines()) == 5 * 2 * 2
    compare.main(["report", *few])
    report = capsys.readouterr().out
    assert report.count("| muon |") == 5
    assert report.count("| accuracy |") == 4
    assert report.count("| hit rate at 10 |") == 1


def test_muon_learns_the_digits():
    point = {"rate": 8e-3, "other_rate": 4e-3, "weight_decay": 0.1}
    cell, settings = {"domain": "digits", "steps": 60}, {"optimizer": "muon"}
    found = training.train(Run("muon", cell, settings, point, 0))
    assert found["accuracy"] > 0.7  # chance: 0.1
    point = {**point, "rate": 0.0}
    untrained = training.train(Run("untrained", cell, settings, point, 0))
    assert untrained["loss"] > found["loss"]


def test_the_last_film_is_asked_and_not_trained_on():
    people = recommendation.histories()
    assert len(people) == 943
    assert sum(map(len, people)) == 100_000
    films, targets = domain_of("movielens").held_out
    asked = targets != 0
    assert bool((asked.sum(1) == 1).all())
    assert targets[asked].tolist() == [of_person[-1] for of_person in people]
    assert [row[row != 0].tolist() for row in films[:9]] == [p[-51:-1] for p in people[:9]]
    inputs, following = domain_of("movielens").train
    pairs = sum(len(of_person) - 2 for of_person in people)  # without the first and the last
    assert int((following != 0).sum()) == pairs
    same = inputs[:, 1:] == following[:, :-1]
    assert bool((same | (following[:, 1:] == 0)).all())


def test_what_is_padded_says_nothing():
    torch.manual_seed(0)
    model = speech.Speaker().eval()
    frames, speakers = domain_of("vowels").held_out
    assert (len(domain_of("vowels").train[0]), len(frames)) == (270, 370)
    assert sorted(set(speakers.tolist())) == list(range(9))
    short = frames[:1, :20].clone()
    short[:, 15:] = torch.nan
    padded = torch.full_like(frames[:1], torch.nan)
    padded[:, :15] = short[:, :15]
    longer = padded.clone()
    longer[:, 15] = 1.0
    logits, again = model(padded), model(torch.cat([padded, longer]))
    torch.testing.assert_close(logits, again[:1])
    assert not torch.allclose(again[0], again[1])  # one more frame is heard
    films = domain_of("movielens").held_out[0][:1].clone()
    torch.manual_seed(0)
    gpt = domain_of("movielens").model().eval()
    before = gpt(films)
    films[0, -1] = 7
    torch.testing.assert_close(gpt(films)[:, :-1], before[:, :-1])


def test_shifts_move_whole_images_and_keep_the_background():
    images = -torch.ones(64, 1, 28, 28)
    images[:, :, 14, 14] = 1.0
    moved = vision.shifted(images, torch.Generator().manual_seed(0))
    places = [tuple(one[0].nonzero().tolist()[0]) for one in (moved > 0).split(1) for one in one]
    assert all(abs(row - 14) <= 3 and abs(column - 14) <= 3 for row, column in places)
    assert len(set(places)) > 20  # of 49
    assert bool(((moved > 0).sum((1, 2, 3)) == 1).all())
    assert float(moved.min()) == -1
