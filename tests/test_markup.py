"""Names with any characters in Markdown and LaTeX: what a reader sees is the name, read back by python-markdown."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from abm_vision import drawing
from abm_vision.analysis.tables import markdown_table
from abm_vision.runs.markup import latex, markdown, one_line

ODD = (
    "a|b",
    "<script>alert(1)</script>",
    "`code` and ``more``",
    "_d_ e_f __g__ h_",
    "*strong* **i**",
    "50% & more &amp; &#35;",
    "# head",
    "$x_{$ and $$",
    r"C:\_new\*",
    "[text](https://example.org) ![i](j) [k]: l [k][k]",
    "~a~ ~~b~~ ^c^",
    "{braces} {: .class }",
    "- list",
    "1. first",
    "> quoted",
    "| --- |",
    "https://example.org/_a_",
    "<https://example.org>",
    "two\nlines\r\n\tand a tab",
    "† 87.3 ± 0.4 – café 模型",
)


class Reader(HTMLParser):
    """The tags of a page, and the text of its cells, items and headings."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)
        self.texts = [text.strip("\n") for text in self.texts]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("td", "th", "li", "h1", "h2", "p", "title"):
            self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data


def rendered(text):
    return Reader(pytest.importorskip("markdown").markdown(text, extensions=["tables"]))


@pytest.mark.parametrize("name", ODD)
def test_markdown_shows_the_name(name):
    page = rendered(f"name: {markdown(name)}\n\n# a {markdown(name)}\n\n- first {markdown(name)}\n")
    expected = " ".join(name.split())
    assert page.texts == [f"name: {expected}", f"a {expected}", f"first {expected}"]
    assert page.tags == ["p", "h1", "ul", "li"]


def test_a_table_shows_its_cells():
    page = rendered(markdown_table(["name", *ODD], [["first", *ODD], ["mean_of_", *reversed(ODD)]], bold=["mean_of_"]))
    cells = [" ".join(name.split()) for name in ODD]
    assert page.texts == ["name", *cells, "first", *cells, "mean_of_", *reversed(cells)]
    assert set(page.tags) == {"table", "thead", "tbody", "tr", "th", "td", "strong"} and page.tags.count("strong") == 1


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zs", "Zl", "Zp"]), min_size=1))
def test_any_cell_comes_back(name):
    page = rendered(markdown_table(["name", "other"], [["x", name]]))
    assert page.texts == ["name", "other", "x", name] and set(page.tags) == {
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }


def test_ordinary_names_stay_readable():
    assert markdown("dsprites_loc, lr 5e-4 (rank 8); attn.qkv") == "dsprites_loc, lr 5e-4 (rank 8); attn.qkv"
    assert markdown("dsprites_loc [rendered], 3 seeds") == "dsprites_loc [rendered], 3 seeds"
    assert latex("ABM, m19 (mean)") == "ABM, m19 (mean)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dsprites_loc 50% & # $", r"dsprites\_loc 50\% \& \# \$"),
        (r"{a}\b", r"\{a\}\textbackslash{}b"),
        ("~^", r"\textasciitilde{}\textasciicircum{}"),
        ("<|>", r"\textless{}\textbar{}\textgreater{}"),
        ("[1pt] *", "{[}1pt{]} {*}"),  # behind the \\ of the line above it would be an argument
        ("87.3 ± 0.4†, –", r"87.3 $\pm$ 0.4$^\dagger$, --"),
        ("two\nlines", "two lines"),
    ],
)
def test_latex_sets_the_text(text, expected):
    assert latex(text) == expected


def test_control_characters_do_not_reach_a_terminal():
    assert one_line("\x1b[31mred\x00\x9b\n\n and  more") == "\ufffd[31mred\ufffd\ufffd and more"


def test_letters_of_other_scripts_come_from_installed_fonts(monkeypatch, tmp_path):
    monkeypatch.setattr(drawing, "get_font_names", lambda: ["Comic Sans MS", "WenQuanYi Zen Hei", "DejaVu Sans"])
    monkeypatch.setattr(drawing, "write_atomically", lambda path, write: None)
    figure = Figure()
    name = figure.text(0, 0, "猫")
    drawing.save_figure(figure, tmp_path / "a.png")
    assert name.get_fontfamily() == ["DejaVu Sans", "WenQuanYi Zen Hei"]


@pytest.mark.figures
def test_letters_that_no_font_has_are_named_once(tmp_path):
    figure = Figure()
    figure.text(0, 0, "\U000f0001 and \U000f0002")
    with pytest.warns(UserWarning) as warned:
        drawing.save_figure(figure, tmp_path / "a.png")
    (message,) = [str(one.message) for one in warned]
    assert "a.png: no installed font has some of its letters" in message and (tmp_path / "a.png").stat().st_size
