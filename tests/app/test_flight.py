import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.wire import Delta, SamplingParams, TokenLogprobs
from app.flight import Flight, Generation, TokensMissing


def flight(notify=lambda flight: None):
    return Flight(Generation("r", [1, 2, 3], SamplingParams(max_tokens=100)), 0, 0.0, notify)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans()), min_size=1, max_size=30), st.booleans())
def test_whatever_repeats_every_token_is_delivered_once_and_in_order(pieces, logprobs):
    """Deltas that start at or before what was received, as replays make them, taken at any time."""
    news = []
    it = flight(news.append)
    sent = 0
    got, got_logprobs = [], []
    for back, count, take in pieces:
        offset = max(0, sent - back)
        tokens = list(range(offset, offset + count))
        delta = Delta("r", offset, tokens)
        if logprobs:
            delta.logprobs = [TokenLogprobs(-float(token), []) for token in tokens]
        sent = max(sent, offset + count)
        it.absorb(delta)
        if take and news:
            news.clear()
            taken = it.take()
            assert taken.offset == len(got)
            got += taken.tokens
            got_logprobs += taken.logprobs or []
    if news:
        taken = it.take()
        got += taken.tokens
        got_logprobs += taken.logprobs or []
    assert got == list(range(sent)) == it.tokens
    if logprobs:
        assert [-item.logprob for item in got_logprobs] == got


def test_a_finish_without_tokens_is_news():
    news = []
    it = flight(news.append)
    it.absorb(Delta("r", 0, [5]))
    it.absorb(Delta("r", 0, [5], finish="length"))
    assert len(news) == 1
    taken = it.take()
    assert (taken.tokens, taken.finish) == ([5], "length")


def test_a_gap_is_an_error_that_names_the_counts():
    it = flight()
    it.absorb(Delta("r", 0, [5, 6]))
    with pytest.raises(TokensMissing, match="from 4 on, but holds only 2"):
        it.absorb(Delta("r", 4, [9]))


def test_an_attempt_continues_from_the_tokens_and_has_a_name_of_its_own():
    it = flight()
    it.absorb(Delta("r", 0, [5, 6]))
    assert it.submit(1).request_id == "r"
    it.next_attempt()
    submit = it.submit(2)
    assert submit.request_id != "r"
    assert (submit.epoch, submit.prompt, submit.generated) == (2, [1, 2, 3], [5, 6])
