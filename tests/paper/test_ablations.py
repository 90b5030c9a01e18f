"""Table VI and figures 4 and 5: each variant is a run of TokenRec that differs in what it says, on validation only."""

import ablations
import pytest
from records import Job

from tokenrec_hf import Recipe


def recorded(job):
    """A record whose numbers tell the seed and the mask."""
    assert job.model == f"tokenrec-{job.settings['recipe']}"
    value = job.seed / 10 + job.settings["mq_tokenizer"]["config"].get("mask_ratio", 0.0)
    codes = {kind: {"reconstruction_error": value, "unique": 1.0} for kind in ("user", "item")}
    metrics = {name: {"hr@20": value, "ndcg@20": value / 2} for name in ("tokenrec", *ablations.OTHERS)}
    return {"metrics": {"validation": metrics}, "codes": codes}


@pytest.mark.parametrize("name", ablations.STUDIES)
def test_every_variant_is_a_recipe_that_can_be_trained(name):
    recipe, short = ablations.base_of(name)
    for changes in ablations.STUDIES[name].values():
        Recipe.load(recipe, overrides={**short, **changes})


def flat(settings, place=""):
    """`{"section.name": value}` of nested settings."""
    for name, value in settings.items():
        yield from flat(value, f"{place}{name}.") if isinstance(value, dict) else [(place + name, value)]


@pytest.mark.parametrize("name", ablations.STUDIES)
def test_variants_differ_in_what_they_say_only_and_never_see_the_test_items(name):
    jobs: list[Job] = []
    ablations.study("demo", name, 2, lambda job: jobs.append(job) or recorded(job))
    assert {job.phase for job in jobs} == {"validation"}
    assert [job.seed for job in jobs] == [0, 1] * len(ablations.STUDIES[name])
    recipe, short = ablations.base_of(name)
    whole = dict(flat(Recipe.load(recipe, overrides=short).to_dict()))
    for job, changes in zip(jobs[::2], ablations.STUDIES[name].values()):
        found = dict(flat(job.settings))
        assert {place for place in found if found[place] != whole[place]} <= changes.keys()
        assert {place: found[place] for place in changes} == changes


def test_one_codebook_has_as_many_codewords_as_all_together():
    usual = Recipe.load("paper").mq_tokenizer.config["num_codebooks"] * 256
    changes = ablations.STUDIES["table6"]["without K ways"]
    assert changes["mq_tokenizer.config.num_codebooks"] * changes["mq_tokenizer.config.codebook_size"] == usual


def test_the_table_has_means_and_deviations_and_the_plot_a_panel_for_each_parameter(tmp_path):
    rows = ablations.study("demo", "figure4", 2, recorded)
    table = ablations.markdown(rows)
    # rho = 0.5: 0.5 and 0.6.
    assert "| rho = 0.5 | 0.5500 ± 0.0707 | 0.2750 ± 0.0354 |" in table
    ablations.plot(rows, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_study_of_recipe_best_shows_what_is_done_without_user_and_without_t5():
    rows = ablations.study("demo", "best", 2, recorded)
    assert rows["whole"]["history only ndcg@20"] == rows["whole"]["vectors ndcg@20"] == [0.0, 0.05]
    assert "history only ndcg@20" not in ablations.study("demo", "table6", 1, recorded)["whole"]
