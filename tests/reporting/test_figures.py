import xml.etree.ElementTree as ElementTree

import matplotlib

from swconv.reporting.figures import Line, draw_lines

LINES = [Line("SW", [16, 24], [90.0, 88.0], [1.0, 2.0]), Line("3x3", [16, 24], [80.0, 60.0], [None, None])]
LEVELS = [("chance", 10.0)]
LABELS = ("distance, px", "top-1, %")


def test_the_same_numbers_give_the_same_svg_whatever_the_users_settings(tmp_path):
    draw_lines(LINES, LEVELS, "title", LABELS, tmp_path / "a" / "figure.svg")
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "svg.hashsalt": None}):
        draw_lines(LINES, LEVELS, "title", LABELS, tmp_path / "b" / "figure.svg")
    drawn = (tmp_path / "a" / "figure.svg").read_bytes()
    assert drawn == (tmp_path / "b" / "figure.svg").read_bytes()
    assert b"<dc:date>" not in drawn
    assert ElementTree.fromstring(drawn).tag.endswith("svg")


def test_other_numbers_give_another_svg(tmp_path):
    draw_lines(LINES, LEVELS, "title", LABELS, tmp_path / "a" / "figure.svg")
    draw_lines(LINES[:1], LEVELS, "title", LABELS, tmp_path / "b" / "figure.svg")
    assert (tmp_path / "a" / "figure.svg").read_bytes() != (tmp_path / "b" / "figure.svg").read_bytes()


def test_the_suffix_names_the_format(tmp_path):
    draw_lines(LINES, LEVELS, "title", LABELS, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_no_lines_still_give_a_figure(tmp_path):
    draw_lines([], LEVELS, "title", LABELS, tmp_path / "figure.svg")
    assert "not run" in (tmp_path / "figure.svg").read_text()
