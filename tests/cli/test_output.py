from tokenrec_hf.cli import output


def items(*names, title=None):
    return [{"rank": 1, "item": name, "score": 0.5, "tokens": "<v1-0>", "title": title} for name in names]


def test_text_is_plain_where_there_is_no_terminal():
    document = {"user": "03", "tokens": "<u1-7>", "history": [], "recommendations": items("08", "a-long-id")}
    assert output.text(output.show_recommendations(document)) == (
        "user_03 = <u1-7>\n"
        "rank  item       score   tokens\n"
        "1     08         0.5000  <v1-0>\n"
        "1     a-long-id  0.5000  <v1-0>"
    )


def test_brackets_and_colons_of_ids_and_titles_are_no_markup():
    document = {"user": None, "history": ["x"], "recommendations": items("[bold]", title="[REC] :smile: [/b]")}
    assert "[bold]  0.5000  <v1-0>  [REC] :smile: [/b]" in output.text(output.show_recommendations(document))


def test_long_rows_are_neither_wrapped_nor_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    document = {"user": None, "history": ["x"], "recommendations": items("a" * 300, title="word " * 100)}
    assert len(output.text(output.show_recommendations(document)).splitlines()) == 3


def test_tables_on_a_terminal_fit_its_width_and_are_styled(monkeypatch):
    # The environment as rich sees it, whatever this process and the tests before have done to their own.
    monkeypatch.setattr(output.Console, "_environ", {"COLUMNS": "60", "FORCE_COLOR": "1", "TERM": "xterm-256color"})
    document = {"user": None, "history": ["x"], "recommendations": items("08", title="word " * 30)}
    text = output.text(output.show_recommendations(document))
    assert "\x1b[1m" in text and len(text.splitlines()) > 3


def test_notes_are_one_line_each(capsys):
    output.note("a\n  long [red] note " + "word " * 100)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("a long [red] note word") and err.count("\n") == 1


def test_a_spinner_writes_nothing_where_there_is_no_terminal(capsys):
    with output.working("training"):
        pass
    assert capsys.readouterr() == ("", "")
