"""What messages share."""

import unicodedata

import pytest

from odtk.text import printable


@pytest.mark.parametrize(
    "name, shown",
    [
        ("red cell", "red cell"),
        ("Größe 細胞 [/] [red] :car:", "Größe 細胞 [/] [red] :car:"),  # markup is the console's affair
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\rb\nc\td\x00", "a\\rb\\nc\\td\\x00"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),  # control characters of one byte in Latin-1, which terminals know too
        ("photo\u202egpj.exe", "photo\\u202egpj.exe"),  # turns the writing direction
        ("bad\udcff", "bad\\udcff"),  # a file name that is not UTF-8, as Python reads it
        ("می\u200cخواهم \U0001f469\u200d\U0001f680", "می\u200cخواهم \U0001f469\u200d\U0001f680"),
    ],
)
def test_names_for_the_terminal(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_no_control_character_is_left() -> None:
    everything = printable("".join(map(chr, range(0x3000))))
    assert {unicodedata.category(c) for c in everything} & {"Cc", "Cs", "Zl", "Zp"} == set()
    everything.encode()
