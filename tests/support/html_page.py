"""Parses HTML like a browser."""

from html.parser import HTMLParser

VOID = {"br", "hr", "img", "input", "link", "meta"}
NOT_SHOWN = ("script", "style")


class Element:
    def __init__(self, page: "HtmlPage", tag: str, attributes: dict[str, str]) -> None:
        self.page, self.tag, self.attributes = page, tag, attributes
        self.source = ""
        self.pieces = slice(len(page.pieces), len(page.pieces))
        self.elements = slice(len(page.elements) + 1, len(page.elements) + 1)

    @property
    def text(self) -> str:
        """All text in the element, except that of scripts and styles."""
        return "".join(self.page.pieces[self.pieces])

    def inner(self, *tags: str) -> list["Element"]:
        return [each for each in self.page.elements[self.elements] if each.tag in tags]

    def end(self) -> None:
        """Ends the element: later content is outside of it."""
        self.pieces = slice(self.pieces.start, len(self.page.pieces))
        self.elements = slice(self.elements.start, len(self.page.elements))


class HtmlPage(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self.pieces: list[str] = []
        self.misplaced: list[str] = []
        """Tags that are closed in the wrong order, or never."""
        self._open: list[Element] = []
        self.feed(text)
        self.close()
        self.misplaced += [each.tag for each in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(self, tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(self, tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        tags = [each.tag for each in self._open]
        if tags[-1:] != [tag]:
            self.misplaced.append(tag)
        if tag in tags:
            while self._open[-1].tag != tag:
                self._open.pop().end()
            self._open.pop().end()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1].tag in NOT_SHOWN:
            self._open[-1].source += data
        else:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        """All text except that of scripts and styles, with single spaces."""
        return " ".join("".join(self.pieces).split())

    def all(self, tag: str, name: str | None = None) -> list[Element]:
        """Returns the elements with a tag, and with a class if one is given."""
        return [
            each
            for each in self.elements
            if each.tag == tag and name in (None, each.attributes.get("class"))
        ]

    def texts(self, tag: str, name: str | None = None) -> list[str]:
        """Returns the texts of these elements, with single spaces."""
        return [" ".join(each.text.split()) for each in self.all(tag, name)]

    def values(self, attribute: str) -> list[str]:
        """Returns the values of an attribute, of the elements that have it."""
        return [
            each.attributes[attribute] for each in self.elements if attribute in each.attributes
        ]

    def cells(self, identifier: str) -> list[list[str]]:
        """Returns the texts of a table's cells, row by row; none if there is no such table."""
        tables = [each for each in self.all("table") if each.attributes.get("id") == identifier]
        rows = [row for table in tables for row in table.inner("tr")]
        return [[cell.text for cell in row.inner("td", "th")] for row in rows]
