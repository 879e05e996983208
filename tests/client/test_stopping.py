"""Stop texts: letter by letter or in any pieces, the same as looking at the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from petalite.client.stopping import StopTexts


def cut(text: str, stops: list[str]) -> str:
    """By definition: the shortest beginning that ends in a stop, less the longest stop that it ends in."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


LETTERS = st.text(alphabet="ab", max_size=12)


@given(st.lists(LETTERS, max_size=8), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_in_pieces_as_at_once(pieces: list[str], stops: list[str]) -> None:
    watch, given_out = StopTexts(stops), ""
    whole = "".join(pieces)
    for index, piece in enumerate(pieces):
        given_out += watch.step(piece)
        so_far = "".join(pieces[: index + 1])
        assert cut(so_far, stops).startswith(given_out)
        if watch.found is None:
            held = len(so_far) - len(given_out)
            assert held < max(map(len, stops), default=1), "no more is held back than may begin a stop"
            assert not held or any(stop.startswith(so_far[-held:]) for stop in stops)
    assert given_out + watch.flush() == cut(whole, stops)
    assert (watch.found is not None) == any(stop in whole for stop in stops)


def test_a_stop_in_two_halves_never_shows() -> None:
    watch = StopTexts(["</end>"])
    assert [watch.step(piece) for piece in ("Hi <b", "> </", "e", "nd> more")] == ["Hi <b", "> ", "", ""]
    assert watch.found == "</end>"
    assert watch.step("after") == watch.flush() == ""
