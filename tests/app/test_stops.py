import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.stops import StopScanner

text = st.text("ab•😀", max_size=24)
stop_lists = st.lists(st.text("ab•😀", min_size=1, max_size=5), min_size=1, max_size=4)


def whole(text, stops):
    """By definition: the shortest beginning of the text that ends in a stop string, without the longest such."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            hit = max(hits, key=len)
            return text[: end - len(hit)], hit
    return text, None


@given(text, stop_lists, st.lists(st.integers(0, 24)))
def test_any_cutting_gives_the_text_before_the_first_stop(text, stops, cuts):
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    scanner = StopScanner(stops)
    out = ""
    for begin, end in itertools.pairwise(edges):
        out += scanner.add(text[begin:end])
        assert whole(text, stops)[0].startswith(out)  # nothing is shown that must be taken back
    hit = scanner.hit
    out += scanner.finish()
    assert (out, hit) == whole(text, stops)


@given(text, stop_lists)
def test_no_more_is_held_back_than_may_become_a_stop(text, stops):
    scanner = StopScanner(stops)
    shown = scanner.add(text)
    if scanner.hit is None:
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "hit"),
    [
        (["The e", "nd.", " More"], ["end."], ["The ", "", ""], "end."),
        (["a\n", "b\n", "\n", "c"], ["\n\n"], ["a", "\nb", "", ""], "\n\n"),
        (["abc", "d"], ["bcx"], ["a", "bcd"], None),
    ],
)
def test_examples(pieces, stops, shown, hit):
    scanner = StopScanner(stops)
    assert [scanner.add(piece) for piece in pieces] == shown
    assert scanner.hit == hit
