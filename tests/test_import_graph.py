"""The picture of the imports in docs/ shows the code as it is."""

from collections import Counter
from xml.etree import ElementTree

from tests.support.import_graph import draw, package_imports
from tests.support.paths import ROOT
from tests.test_layers import LAYERS

SVG = "{http://www.w3.org/2000/svg}"
PICTURE = ROOT / "docs" / "images" / "imports.svg"


def test_the_picture_is_up_to_date() -> None:
    fresh = draw(LAYERS, package_imports())
    assert PICTURE.read_text(encoding="utf-8") == fresh, "the imports changed: run `make graph`"


def test_an_import_is_a_dot_in_the_row_of_one_and_the_column_of_the_other() -> None:
    imports = Counter({("config", "common"): 12, ("data", "config"): 1})
    picture = ElementTree.fromstring(draw(["common", "config", "data"], imports))
    boxes = [box for box in picture.iter(f"{SVG}rect") if box.get("class") == "box"]
    column = [float(box.attrib["x"]) + float(box.attrib["width"]) / 2 for box in boxes]
    row = [float(box.attrib["y"]) + float(box.attrib["height"]) / 2 for box in boxes]
    assert column == sorted(column) and row == sorted(row, reverse=True)  # the lowest layer first
    dots = [
        (float(dot.attrib["cx"]), float(dot.attrib["cy"]), float(dot.attrib["r"]))
        for dot in picture.iter(f"{SVG}circle")
    ]
    assert dots[:2] == [(column[0], row[1], 6.5), (column[1], row[2], 3.0)]
    assert len(dots) == 2 + 3  # and three in the legend
    assert len(list(picture.iter(f"{SVG}path"))) == 2  # an arrow into each that is imported
