"""Values in templates are text, whatever stands in them: in HTML, in Markdown, in the model card and in TensorBoard."""

import re
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markupsafe import Markup

from nqf.tools.templates import code_span, html, markdown, plain
from nqf.training.writer import Writer

HOSTILE = [
    "<script>alert(1)</script>", "[click](javascript:alert(1))", "![x](https://example.org/x.png)",
    "`code` ``` | a | b", "# head", "1. one", "123456789. one", "- list", "---", "+ x", "> quote",
    "**bold** _it_ ~~gone~~", "a\n\n# b\r\n===", "&lt;b&gt; &#60;", "\\", "\\`",
    "https://example.org www.example.org <https://a.b> me@example.org", "x\x1b[2J\x9b31m\x00",
    "\u202egnp.exe", "{{ 7 * 7 }} {% raw %}", "$x$", "snake_case_name", "``", " ` ", "",
]  # fmt: skip
texts = (
    st.text(max_size=40)
    | st.sampled_from(HOSTILE)
    | st.lists(st.sampled_from("`*_[]()<>!|\\~#-+1. \n&x:/@"), max_size=20).map("".join)
)


def one_line(text: str) -> str:
    return " ".join(plain(text).split())


class Text(HTMLParser):
    """Text and tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.tags = "", set()
        self.feed(page)
        self.close()

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.text += "".join(value or "" for name, value in attrs if name == "title")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates")
    (folder / "x.html.j2").write_text('<p title="{{ value }}">{{ value }}</p>')
    (folder / "x.md.j2").write_text("{{ value }}\n\n- {{ value }}\n\n| a | b |\n|---|---|\n| {{ value }} | b |\n")
    (folder / "code.md.j2").write_text("- {{ value | code }}\n")
    return folder


@settings(deadline=None)
@given(value=texts)
def test_a_value_is_text_in_html(folder: Path, value: str) -> None:
    page = Text(html(folder / "x.html.j2", value=value))
    assert page.tags == {"p"}
    assert page.text == 2 * plain(value)


@settings(deadline=None)
@given(value=texts)
@example(value="9. x")
@example(value="__0__")
@example(value="a__b_ __c__d")
def test_a_value_is_text_in_markdown(folder: Path, value: str) -> None:
    """By an independent parser, with tables as GitHub has them."""
    source = markdown(folder / "x.md.j2", value=value)
    parsed = Text(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(source))
    assert parsed.tags <= {"p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}
    words = one_line(value).split()
    assert parsed.text.split() == [*words, *words, "a", "b", *words, "b"]
    assert not re.search(r"[^\\]@|https?://|www\.", source)


@settings(deadline=None)
@given(value=texts)
def test_a_value_is_code_in_markdown(folder: Path, value: str) -> None:
    parsed = Text(MarkdownIt("commonmark").render(markdown(folder / "code.md.j2", value=value)))
    assert parsed.tags == {"ul", "li", "code"}
    assert parsed.text.strip() == one_line(value).strip()


def test_markup_is_kept_and_a_missing_value_is_an_error(folder: Path) -> None:
    assert html(folder / "x.html.j2", value=Markup("<b>")).count("<b>") == 2
    assert "*b*" in markdown(folder / "x.md.j2", value=Markup("*b*"))
    for fill, name in ((html, "x.html.j2"), (markdown, "x.md.j2")):
        with pytest.raises(jinja2.UndefinedError):
            fill(folder / name)
    assert code_span("a`b") == "``a`b``"


@pytest.mark.parametrize("value", HOSTILE)
def test_no_control_character_stays(value: str) -> None:
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", plain(value))


def test_names_in_tensorboard_are_words(tmp_path: Path) -> None:
    with Writer(tmp_path, "item", resumed_step=0) as writer:
        writer.write(1, {"<script>alert(1)</script>\x1b[31m": 1.0})
    (events,) = (tmp_path / "tensorboard").rglob("events*")
    content = events.read_bytes()
    assert b"script" in content and b"<script" not in content and b"\x1b[" not in content
