"""The page: its parts as HTML, the command, and one walk through all of it in a real browser."""

import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from page_checks import texts

pytest.importorskip("gradio", reason='the page needs the extra: pip install "tokenrec-hf[demo]"')

from tokenrec_hf import Recommender, Repository
from tokenrec_hf.cli import demo
from tokenrec_hf.cli.app import main
from tokenrec_hf.cli.markup import training
from tokenrec_hf.cli.naming import known_titles
from tokenrec_hf.cli.showcase import Showcase

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Without the background services of Chromium, every connection is one that the page asks for.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
VIEWPORTS = {"desktop": (1280, 900), "tablet": (820, 1180), "phone": (390, 844)}


@pytest.fixture(scope="module")
def showcase(trained_repository):
    """The trained recommender, whose items have a genre: the noun of their titles."""
    recommender, titles = Recommender.from_pretrained(trained_repository), known_titles("demo")
    items = recommender.store.ids("item")
    recommender.store.set_metadata(items, [{"genre": titles[item].split()[-1]} for item in items])
    return Showcase(recommender, titles)


@pytest.fixture(scope="module")
def metrics(trained_repository):
    return Repository(trained_repository).metrics


def test_the_parts_are_well_formed_and_show_the_answer(showcase, metrics):
    found = showcase.ask("u001", ["f001"], top_k=5)
    shown = texts(demo.suggestions("Recommended", "by TokenRec", found.recommended, "cosine"))
    assert [row.title for row in found.recommended] == [text.strip() for text in shown if text.startswith("The ")]
    assert "because of The Silent Harbor" in shown
    tokens = texts(demo.token_table(showcase, "u001", found))
    assert "".join(tokens).count("<u1-") == 1 and "".join(tokens).count("<v1-") == 1
    assert "".join(texts(demo.prompt(found))) == found.prompt
    marks = texts(demo.item_map(showcase, found))
    assert marks.count("The Silent Harbor") == 2, "once in the catalogue, once in the history"
    assert {"1", "2", "3", "4", "5", "query"} <= set(marks)
    assert {"TokenRec", "HR@20", "T5", "Codebooks of items "} <= set(texts("".join(training(showcase, metrics))))
    assert "u001" in demo.status("u001", found) and "someone new" in demo.status("", found)


def test_training_is_shown_as_far_as_it_was_measured(showcase):
    shown = texts("".join(training(showcase, {})))
    assert "Codebooks of users " in shown and "Accuracy " not in shown


def test_ids_and_titles_are_text_and_no_html(trained_repository):
    hostile = "<script>alert(1)</script>"
    showcase = Showcase(Recommender.from_pretrained(trained_repository), {"f001": hostile, "f002": hostile})
    found = showcase.ask("u001", ["f001"], top_k=300)
    for part in (
        demo.suggestions("Recommended", "", found.recommended, "cosine"),
        demo.token_table(showcase, "u001", found),
        demo.item_map(showcase, found),
        demo.status(hostile, found),
        demo.alert(hostile),
        demo.heading(showcase, hostile),
    ):
        assert "<script" not in part and "&lt;script&gt;" in part


def test_the_command_shows_the_page_until_it_is_interrupted(trained_repository):
    command = [sys.executable, "-m", "tokenrec_hf.cli.app", "demo", str(trained_repository)]
    # A test run in the background of a shell ignores interruptions, and so would the command.
    interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    )
    try:
        line = next(line for line in process.stderr if line.startswith("showing "))
        address = re.search(r"on (http://127.0.0.1:\d+/);", line)[1]
        page = urllib.request.urlopen(address).read().decode()
        assert trained_repository.name in page and "fonts.googleapis.com" not in page
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert process.stdout.read() == ""
    finally:
        process.kill()


def test_the_python_of_the_docs_shows_a_page(trained_repository, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "demo.md").read_text(encoding="utf-8")
    (tmp_path / "tokenrec-quickstart").symlink_to(trained_repository)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"^```python\n(.*?)^```", page, re.M | re.S)[1], {})
    assert capsys.readouterr().out.startswith("http://127.0.0.1:")


def test_a_port_that_is_taken_is_named(showcase):
    with demo.serve(demo.build(showcase, {})) as address:
        second = demo.serve(demo.build(showcase, {}), port=int(address.rstrip("/").split(":")[-1]))
        with pytest.raises(OSError, match="give another --port"), second:
            pass


def test_without_the_extra_a_sentence_tells_how_to_get_it(capsys, monkeypatch, trained_repository):
    monkeypatch.delitem(sys.modules, "tokenrec_hf.cli.demo")
    monkeypatch.delattr("tokenrec_hf.cli.demo")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", str(trained_repository)]) == 1
    assert capsys.readouterr().err == ('tokenrec: error: the page needs Gradio: pip install "tokenrec-hf[demo]".\n')


@pytest.fixture(scope="module")
def browser():
    """Chromium, as Debian's or another distribution's package."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the walk through the page needs playwright")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine, so nobody walks through the page")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize(("device", "scheme"), [("desktop", "light"), ("tablet", "dark"), ("phone", "light")])
def test_a_walk_through_the_page(browser, showcase, metrics, tmp_path, monkeypatch, device, scheme):
    """Every control is found by its label and used, by keyboard where it can be; nothing is asked of another host."""
    from playwright.sync_api import expect

    # Of longer lists than this, other ids are typed: unknown ones, too.
    monkeypatch.setattr(demo, "LISTED", 5_000 if scheme == "light" else 100)
    width, height = VIEWPORTS[device]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, asked, errors = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    with demo.serve(demo.build(showcase, metrics, "A repository")) as address:
        page.goto(address)
        said = page.locator(".tokenrec [role=status], .tokenrec [role=alert]")
        best = page.get_by_role("table", name="Recommended").locator("tbody tr")
        user, history = page.get_by_label("User"), page.get_by_label("History, oldest first")

        expect(said).to_contain_text("For user u001, by a history of")
        expect(best).to_have_count(10)
        expect(page.get_by_role("table", name="Nearest")).to_contain_text("because of")
        expect(page.get_by_role("table", name="Popular").locator("tbody tr")).to_have_count(10)
        expect(page.get_by_role("img", name="Map of the items")).to_be_visible()
        expect(page.get_by_role("region", name="Tokens")).to_contain_text("<u1-")
        page.screenshot(path=tmp_path / f"{device}-{scheme}.png", full_page=True)

        user.fill("u002")
        user.press("Enter")
        expect(said).to_contain_text("For user u002")
        if scheme == "dark":
            user.fill("nobody")
            user.press("Enter")
            expect(said).to_contain_text("user 'nobody' is unknown")
            expect(best).to_have_count(0)
        user.fill("someone")
        user.press("ArrowDown")
        user.press("Enter")
        expect(said).to_have_text("Choose a user, or items for the history of someone new.")
        history.fill("Silent Har")
        history.press("ArrowDown")
        history.press("Enter")
        expect(said).to_contain_text("For someone new, by a history of 1 item.")
        expect(best.first).to_contain_text("because of The Silent Harbor")
        expect(page.get_by_role("region", name="Tokens")).not_to_contain_text("<u1-")

        page.get_by_label("Filter by").click()
        page.get_by_role("option", name="genre").click()
        page.get_by_label("Only these values").click()
        page.get_by_role("option", name="Dragon").click()
        expect(best.last).to_contain_text("Dragon")
        expect(best.filter(has_not_text="Dragon f")).to_have_count(0)
        page.keyboard.press("Escape")
        page.get_by_label("Only these values").press("Backspace")
        expect(best).to_have_count(10)

        page.get_by_label("number input for Number of items").fill("5")
        page.get_by_label("number input for Number of items").press("Enter")
        expect(best).to_have_count(5)
        page.get_by_role("button", name="The prompt that T5 reads").press("Enter")
        expect(page.get_by_text(re.compile("^What .*item_<v1-"))).to_be_visible()

        page.get_by_role("tab", name="Recommend").press("ArrowRight")
        page.get_by_role("tab", name="Training").click()
        expect(page.get_by_role("table", name="Accuracy on test items")).to_contain_text("TokenRec")
        expect(page.get_by_role("table", name="Codebooks of users").locator("tbody tr")).to_have_count(3)
        page.screenshot(path=tmp_path / f"{device}-{scheme}-training.png", full_page=True)

        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert errors == []
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    context.close()
