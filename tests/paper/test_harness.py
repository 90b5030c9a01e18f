"""The protocol: chosen on validation, refit, tested once, and never the same fit twice."""

import json
import re
import sys
from dataclasses import asdict
from types import SimpleNamespace

import fit_one
import harness
import pytest
import table2
import torch
from baselines import registry
from baselines.base import Baseline
from harness import FitError, Fits, study
from records import Job, Records
from report import fit_cell, markdown, summary

from tokenrec_hf import Repository
from tokenrec_hf.data.splits import index_splits


class Spy(Baseline):
    """Scores items by number, upwards or downwards, and notes what it is fit with."""

    name, title = "spy", "Spy"
    grid = ({"sign": 1}, {"sign": -1})
    calls: list = []

    def fit(self, train, validation, epochs=None):
        self.num_items = train.num_items
        Spy.calls.append((self.seed, self.settings["sign"], train, validation, epochs))
        self.epochs = 5 + self.seed if validation is not None else epochs

    def scores(self, users):
        return self.settings["sign"] * torch.arange(self.num_items).float().expand(len(users), -1)


class InProcess(Fits):
    """Fits here and now, so that a class of this file can be fit; counts."""

    count = 0

    def run(self, job):
        self.count += 1
        self.records.put(job.dataset, [fit_one.fit_one(asdict(job), self.work)])


def lines_of(results):
    """The records of the demo data."""
    return [json.loads(line) for line in (results / "demo.jsonl").read_text().splitlines()]


def write_lines(results, records):
    (results / "demo.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def forget(results, phase, seed):
    """Deletes one record."""
    kept = [one for one in lines_of(results) if (one["job"]["phase"], one["job"]["seed"]) != (phase, seed)]
    assert len(kept) == len(lines_of(results)) - 1
    write_lines(results, kept)


@pytest.fixture
def spied(monkeypatch):
    monkeypatch.setattr(Spy, "calls", [])
    monkeypatch.setitem(registry.BASELINES, "spy", "spy:Spy")
    for module in (harness, fit_one):
        monkeypatch.setattr(module, "load_baseline", lambda name: Spy)
    return Spy


def test_settings_are_chosen_on_validation_and_the_refit_never_sees_the_test_items(spied, tmp_path, demo_splits):
    fits = InProcess(tmp_path / "results", tmp_path)
    (row,) = study("demo", "spy", seeds=2, fits=fits)
    jobs = [(one["job"]["phase"], one["job"]["seed"]) for one in lines_of(tmp_path / "results")]
    assert jobs == [("test", 0), ("test", 1), ("validation", 0), ("validation", 0), ("validation", 1)]
    trials = lines_of(tmp_path / "results")[2:4]
    best = max(trials, key=lambda record: record["metrics"]["ndcg@20"])["job"]["settings"]["sign"]
    assert row["settings"] == f"sign={best}"
    assert row["trials"] == 2

    before, after = index_splits(demo_splits, "validation"), index_splits(demo_splits, "test")
    # Both settings with seed 0, its refit, then seed 1 and its refit: five fits.
    assert [(seed, epochs) for seed, _, _, _, epochs in spied.calls] == [(0, None)] * 2 + [(0, 5), (1, None), (1, 6)]
    for _, sign, train, validation, epochs in spied.calls:
        expected = before if epochs is None else after
        assert train.items.tolist() == expected.interactions.items.tolist()
        if epochs is None:
            assert validation.targets.tolist() == before.holdout.targets.tolist()
        else:
            assert validation is None
            assert sign == best
            held_out = train.contains(after.holdout.users, after.holdout.targets)
            assert not held_out.any()
    assert row["epochs"] == [5, 6]


def test_a_second_run_repeats_nothing_and_an_interrupted_one_goes_on(spied, tmp_path):
    fits = InProcess(tmp_path / "results", tmp_path)
    first = study("demo", "spy", seeds=2, fits=fits)
    assert fits.count == 5
    assert study("demo", "spy", seeds=2, fits=fits) == first
    assert fits.count == 5
    forget(tmp_path / "results", "test", 1)
    again = study("demo", "spy", seeds=2, fits=fits)
    assert fits.count == 6
    assert [one["test"] for one in again] == [one["test"] for one in first]
    # A third seed is two fits more.
    study("demo", "spy", seeds=3, fits=fits)
    assert fits.count == 8


def test_a_refit_of_another_length_is_out_of_date(spied, tmp_path):
    fits = InProcess(tmp_path / "results", tmp_path)
    fits(Job("demo", "spy", "test", 0, {"sign": 1}, 5))
    fits(Job("demo", "spy", "test", 0, {"sign": 1}, 7))
    assert [epochs for *_, epochs in spied.calls] == [5, 7]


def test_fewer_trials_take_the_first_of_the_grid(spied, tmp_path):
    (row,) = study("demo", "spy", seeds=1, fits=InProcess(tmp_path / "results", tmp_path), trials=1)
    assert row["settings"] == "sign=1"
    assert row["trials"] == 1


def test_a_model_without_randomness_has_one_run(spied, tmp_path, monkeypatch):
    monkeypatch.setattr(Spy, "deterministic", True)
    (row,) = study("demo", "spy", seeds=3, fits=InProcess(tmp_path / "results", tmp_path))
    assert len(row["test"]) == 1


def test_a_fit_that_crashes_is_named_and_leaves_no_record(tmp_path):
    job = Job("demo", "ease", "validation", 0, {"no such setting": 1})
    with pytest.raises(FitError, match="ease on demo ended with exit code"):
        Fits(tmp_path, tmp_path)(job)
    assert Records(tmp_path).find(job) is None


def run_table2(monkeypatch, *arguments):
    """The exit code of table2.py with these arguments."""
    monkeypatch.setattr(sys, "argv", ["table2.py", "--dataset", "demo", *map(str, arguments)])
    return table2.main()


@pytest.mark.slow
def test_the_command_prints_the_table_and_a_second_time_trains_nothing(tmp_path, monkeypatch, capsys):
    models, results = ("--models", "popularity", "ease"), ("--results", tmp_path / "results")
    assert run_table2(monkeypatch, *models, "--trials", 1, *results) == 0
    first = capsys.readouterr().out
    assert "demo ease test seed 0: l2=" in first
    table = first[first.index("## demo") :]
    popularity, ease = (
        float(re.search(rf"\| {name} \|(?: 0\.\d+ \|) (0\.\d+) ", table)[1]) for name in ("Popularity", "EASE")
    )
    assert ease > popularity
    assert run_table2(monkeypatch, *models, "--trials", 1, *results) == 0
    assert capsys.readouterr().out == table
    assert run_table2(monkeypatch, "--recorded", *results) == 0
    assert capsys.readouterr().out == table
    assert run_table2(monkeypatch, "--recorded", "--results", tmp_path) == 1
    assert "has no finished model on demo" in capsys.readouterr().err


def test_an_unknown_model_gets_a_sentence(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_table2(monkeypatch, "--models", "nope")
    assert "there is no model 'nope'; choose all, or among popularity, itemknn" in capsys.readouterr().err


def test_what_is_recorded_makes_a_table_without_a_fit(spied, tmp_path):
    results = tmp_path / "results"
    assert harness.recorded("demo", "spy", results) == (0, 0)
    fits = InProcess(results, tmp_path)
    rows = study("demo", "spy", seeds=2, fits=fits)
    assert harness.recorded("demo", "spy", results) == (2, 2)
    count = fits.count
    assert study("demo", "spy", 2, fits, 2) == rows and fits.count == count
    forget(results, "test", 1)
    assert harness.recorded("demo", "spy", results) == (1, 2)
    assert harness.recorded("demo", "tokenrec-best", results) == (0, 1)


@pytest.mark.slow
def test_tokenrec_has_five_rows_from_one_training(tmp_path, tiny_recipe, monkeypatch):
    monkeypatch.setattr(harness, "_recipe", lambda model: harness.settings_of(tiny_recipe))
    fits = InProcess(tmp_path / "results", tmp_path / "work")
    rows = study("demo", "tokenrec-paper", seeds=1, fits=fits)
    titles = ["TokenRec `paper`", "TokenRec `paper`, user id only", "TokenRec `paper`, unseen prompt"]
    titles += ["TokenRec `paper`, history only", "TokenRec `paper`, its vectors without T5"]
    assert [row["title"] for row in rows] == titles
    assert fits.count == 1
    repository = next((tmp_path / "work" / "demo").iterdir())
    metrics = json.loads((repository / "metrics.json").read_text())
    assert rows[1]["test"] == [metrics["test"]["tokenrec_user_id_only"]]
    assert rows[0]["validation"] == [metrics["validation"]["tokenrec"]]
    assert rows[4]["test"] == [metrics["test"]["collaborative_cosine"]]
    assert rows[0]["fit_seconds"][0] > 0
    assert "recipe `paper`" in markdown(rows, "demo")
    (record,) = lines_of(tmp_path / "results")
    assert record["audit"]["passed"] >= 10

    # A repository that has seen a held-out item gets no record.
    write_lines(tmp_path / "results", [])
    leak = SimpleNamespace(passed=False, finding="the test items were seen.")
    monkeypatch.setattr(Repository, "audit", lambda self: [leak])
    with pytest.raises(RuntimeError, match="the test items were seen"):
        study("demo", "tokenrec-paper", seeds=1, fits=fits)
    assert lines_of(tmp_path / "results") == []


def test_a_recipe_that_is_changed_says_so(tmp_path):
    paper, small = (harness._recipe(f"tokenrec-{name}") for name in ("paper", "paper-small"))
    assert small["retrieval"]["backbone"] is None and small["retrieval"]["config"]["num_layers"] == 1
    # Vectors, codes and loss are the paper's.
    assert small["collaborative"] == paper["collaborative"] and small["mq_tokenizer"] == paper["mq_tokenizer"]
    assert small["retrieval"]["config"]["loss_type"] == "cosine_ranking"
    measured = {"hr@20": 0.1, "ndcg@20": 0.1}
    variants = dict.fromkeys((*harness.VARIANTS, harness.VECTORS), measured)
    record = {
        "metrics": {"validation": variants, "test": variants},
        "job": {"epochs": None},
        "epochs": {},
        "fit": {"seconds": 1.0},
        **{"peak_bytes": 1, "data": "d", "threads": 1, "accelerator": None},
    }
    asked = []
    rows = study("demo", "tokenrec-paper-small", 1, lambda job: asked.append(job) or record)
    assert rows[0]["title"] == "TokenRec `paper`, small T5" and rows[0]["settings"] == "recipe `paper`, changed"
    assert [job.settings for job in asked] == [small]
    assert harness.describe(asked[0]) == "recipe paper, small T5"


def row(*hit_rates, **changes):
    test = [{f"{name}@{k}": value for name in ("hr", "ndcg") for k in (10, 20, 30)} for value in hit_rates]
    usual = {"model": "m", "title": "M", "settings": "a=1", "trials": 2, "validation": test, "test": test}
    measured = {"epochs": [None] * len(test), "fit_seconds": [1.0], "peak_bytes": [2e8], "data": ["d"]}
    measured["accelerators"] = ["none"]
    return {**usual, **measured, **changes}


def test_times_are_those_without_a_gpu_where_there_are_any(spied, tmp_path):
    fits = InProcess(tmp_path / "results", tmp_path)

    def with_gpu(seeds):
        records = lines_of(tmp_path / "results")
        for record in records:
            if record["job"]["phase"] == "test" and record["job"]["seed"] in seeds:
                record |= {"accelerator": "A GPU", "fit": {"seconds": 1.0, "cpu_seconds": 1000.0}}
        write_lines(tmp_path / "results", records)

    study("demo", "spy", 2, fits)
    with_gpu([1])
    (mixed,) = study("demo", "spy", 2, fits)
    assert len(mixed["test"]) == 2 and len(mixed["fit_seconds"]) == len(mixed["peak_bytes"]) == 1
    assert mixed["fit_seconds"][0] < 1000
    assert fit_cell(mixed).isdigit()
    with_gpu([0, 1])
    (on_gpu,) = study("demo", "spy", 2, fits)
    assert fit_cell(on_gpu, 1) == "1000.0 (GPU)"


def test_the_spread_is_the_sample_standard_deviation_and_one_run_has_none():
    assert summary(row(0.1, 0.2, 0.3))["hr@20"] == (pytest.approx(0.2), pytest.approx(0.1))
    assert summary(row(0.1))["ndcg@10"] == (pytest.approx(0.1), None)
    table = markdown([row(0.1, 0.2, 0.3), row(0.1)], "t")
    assert "| M | 0.2000 ± 0.1000 |" in table
    assert "| M | 0.1000 | 0.1000 |" in table


def test_rows_of_different_data_make_no_table():
    with pytest.raises(ValueError, match=r"not all measured on the same data \(m: d; m: e\)"):
        markdown([row(0.1), row(0.1, data=["e"])], "t")


@pytest.mark.parametrize(
    "model, dtype, cuda, expected",
    [
        ("tokenrec-paper-small", torch.bfloat16, False, True),
        ("tokenrec-paper-small", torch.float32, False, False),
        ("tokenrec-paper-small", torch.bfloat16, True, False),
        ("tokenrec-paper", torch.bfloat16, False, False),
    ],
)
def test_a_t5_of_its_own_is_trained_in_bfloat16_where_the_cpu_can(
    model, dtype, cuda, expected, monkeypatch, tmp_path, demo_splits
):
    asked = []

    def train(splits, recipe, folder, **options):
        asked.append(recipe)
        measured = dict.fromkeys((*harness.VARIANTS, harness.VECTORS), {"hr@20": 0.1})
        metrics = {"validation": measured, "codes": {}, "epochs": {}, "seconds": {"selection": {"evaluation": 1.0}}}
        return SimpleNamespace(metrics=metrics, audit=list)

    monkeypatch.setattr(fit_one, "train", train)
    monkeypatch.setattr(fit_one, "product_type", lambda: dtype)
    monkeypatch.setattr(fit_one, "device", lambda: torch.device("cuda" if cuda else "cpu"))
    settings = harness._recipe(model)
    record = fit_one.fit_tokenrec(asdict(Job("demo", model, "validation", 0, settings)), demo_splits, tmp_path)
    assert record["bf16"] is expected
    training = asked[0].retrieval.training
    assert training == settings["retrieval"]["training"] | ({"bf16": True, "use_cpu": True} if expected else {})
    # The settings by which the record is found are the same on all machines.
    assert settings == harness._recipe(model)
