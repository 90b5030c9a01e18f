"""The page of measurements: one file, with the numbers that were measured."""

import json
import re
import shutil

import pytest
from page_checks import texts

from tokenrec_hf import Repository
from tokenrec_hf.cli.app import main
from tokenrec_hf.cli.report import report

COMPARISON = {
    "users": 1000,
    "reference": "tokenrec",
    "methods": [
        {"name": "ease", "ndcg@20": 0.1234, "difference": {"ndcg@20": [-0.01, -0.02, 0.0005]}},
        {"name": "tokenrec", "ndcg@20": 0.1334, "difference": None},
    ],
}


@pytest.fixture(scope="module")
def repository(trained_repository, tmp_path_factory):
    folder = shutil.copytree(trained_repository, tmp_path_factory.mktemp("report") / "<out>")
    (folder / "training" / "comparison.json").write_text(json.dumps(COMPARISON))
    return Repository(folder)


def test_the_command_writes_a_page_with_every_measurement(repository, tmp_path, capsys):
    assert main(["report", str(repository.folder), "--output", str(tmp_path / "a.html")]) == 0
    assert f"is in {tmp_path / 'a.html'}." in capsys.readouterr().out
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    shown, metrics = texts(page), repository.metrics
    assert shown.count("<out>") == 2, "the title and the heading, as text"
    assert f"{metrics['test']['tokenrec']['hr@20']:.3f}" in shown
    # A curve for each stage whose length was chosen.
    for name, points in metrics["curves"].items():
        best = max(points, key=lambda point: point[1])
        assert any(f"best {best[1]:.4f} after {best[0]:g} epochs" in text for text in shown), name
    assert len(metrics["curves"]) == 2 and page.count("<polyline") == 2
    found = repository.evaluate()
    for key in ("hr@20_by_history", "hr@20_by_popularity"):
        for label, own in found[key].items():
            assert label in shown and f"{own['tokenrec']:.3f}" in shown
    assert f"{found['calibration'][9]['hit_rate']:.2%}" in shown
    assert "EASE" in shown and any("-0.0100 [-0.0200, +0.0005]" in text for text in shown)


def test_the_page_asks_no_host_for_anything(repository):
    page = report(repository, "out")
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|src=", page)
    assert "width=device-width" in page and "color-scheme: light dark" in page


def test_a_repository_from_the_hub_has_what_it_recorded(repository, tmp_path):
    folder = shutil.copytree(repository.folder, tmp_path / "shared", ignore=shutil.ignore_patterns("training"))
    shown = texts(report(Repository(folder), "shared"))
    assert "Codebooks of items " in shown and "Accuracy " in shown
    assert "Calibration " not in shown and "Baselines " not in shown
