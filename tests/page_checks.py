"""Pages in HTML, for the tests of all pages."""

from html.parser import HTMLParser

# Elements that have no end.
VOID = ("meta", "br", "img", "input", "link")


class Outline(HTMLParser):
    """Checks that tags are closed in order, and keeps the texts."""

    def __init__(self):
        super().__init__()
        self.open, self.texts = [], []

    def handle_starttag(self, tag, attributes):
        self.open += [tag] * (tag not in VOID)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def texts(html):
    """The texts of a page or of a part of it, whose tags must be closed in order."""
    outline = Outline()
    outline.feed(html)
    assert outline.open == []
    return outline.texts
