"""Names that an artist wrote as one word come apart into words, or stay whole."""

import importlib.util
from pathlib import Path

import pytest

from florence_fast.data.artists import artists_names

SCRIPT = Path(__file__).parents[1] / "scripts" / "glued_names.py"


@pytest.fixture(scope="module")
def speller():
    spec = importlib.util.spec_from_file_location("glued_names", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    artists = ["alarm clock", "ballot box with check", "left writing hand", "dragon face", "head bandage"]
    return module.Speller(artists, ["o’clock", "Christmas tree", "three"])


@pytest.mark.parametrize(
    ("glued", "words"),
    [
        ("alarmclock", "alarm clock"),  # as another artist writes it
        ("christmastree", "christmas tree"),  # Unicode's short name
        ("ballotboxwithboldscriptx", "ballot box with bold script x"),  # a formal name of Unicode
        ("dragonhead", "dragon head"),  # cut into known words
        ("clock3oclock", "clock 3 oclock"),
        ("regionalindicatorb", "regional indicator b"),
        ("ballottboxwithballott", "ballot box with ballot"),  # the artist's slip
        ("cjkunifiedideograph a", "cjk unified ideograph a"),
        ("guapizzq", "guapizzq"),  # what cannot be cut whole stays
    ],
)
def test_spelling(speller, glued, words):
    assert speller.spell(glued) == words


def test_no_name_of_the_shipped_images_is_another_one_without_its_blanks():
    names = artists_names()
    whole = set(names)
    glued = [name for name in names if " " in name and name.replace(" ", "") in whole]
    assert glued == ["black bird"]  # an animal that two artists spell so; the others have no such pair
    assert "ballotboxwithboldscriptx" not in whole and "ballot box with bold script x" in whole
