"""genossm.outputs.report: the page is valid HTML, escapes what it is given and never asks for the network."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from genossm.outputs import report

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(200))


class Page(HTMLParser):
    """Collects tags, their attributes and the text, and checks that tags nest."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == [], self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def html(tmp_path: Path) -> str:
    table = pd.DataFrame({"track": ["a<b>", "mean"], "bins": [12345, 2], "auprc": [0.12345, np.nan]})
    sections = [
        report.Section(
            "Figures & more",
            [report.Figures([("0.9", "AUPRC", "5 times `chance`")]), report.Text("one `x<1`")],
        ),
        report.Section(
            "Table",
            [
                report.Table(
                    table, "What <it> says", {"bins": ",d", "auprc": ".3f"}, {"auprc": "AUPRC"}, (1,)
                ),
                report.Row(
                    [report.Image(PNG, 'a "picture"', "below"), report.Text("beside, with a lone ` quote")]
                ),
                report.Facts({"device": "CPU"}),
                report.Commands(["genossm demo -o <DIR>", "ls"]),
            ],
        ),
    ]
    path = tmp_path / "deep" / "report.html"
    report.write_report(path, title="A <title>", sections=sections, subtitle="under it", footer="the end")
    return path.read_text(encoding="utf-8")


def test_nothing_is_loaded_from_anywhere(html: str) -> None:
    page = Page(html)
    assert re.search(r"(https?:)?//", html.replace("<!--", "")) is None
    assert {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    } == set()
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.attributes("img"))
    assert all(str(link["href"]).startswith("#") for link in page.attributes("a"))
    assert re.search(r"@import|url\(", html) is None
    policy = [meta["content"] for meta in page.attributes("meta") if "http-equiv" in meta]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_text_is_escaped_and_links_lead_to_sections(html: str) -> None:
    page = Page(html)
    assert "a<b>" in page.text and "A <title>" in page.text and "What <it> says" in page.text
    assert "x<1" in page.text and "beside, with a lone ` quote" in page.text
    assert any("genossm demo -o <DIR>\nls" in text for text in page.text)
    sections = [section["id"] for section in page.attributes("section")]
    assert [str(link["href"])[1:] for link in page.attributes("a")] == sections == ["s0", "s1"]


def test_table_formats_aligns_and_marks(html: str) -> None:
    assert '<td class="number">12,345</td><td class="number">0.123</td>' in html
    assert '<tr class="strong"><td>mean</td>' in html
    assert '<span class="none">&ndash;</span>' in html
    assert '<th>track</th><th class="number">bins</th><th class="number">AUPRC</th>' in html


def test_image_bytes_and_description_are_in_the_page(html: str) -> None:
    (image,) = Page(html).attributes("img")
    assert base64.b64decode(str(image["src"]).split(",", 1)[1]) == PNG
    assert image["alt"] == 'a "picture"'
