"""Engines get cores of their own, whatever the machine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.cores import divide_cores, parse_cores, usable_cores

PAIR = ((0, 1),)  # one core with two threads, as small cloud machines have
QUAD = tuple((n, n + 16) for n in range(16))


def test_one_engine_has_the_machine_and_vllm_chooses():
    assert divide_cores([False], QUAD) == [()]


def test_chat_and_embeddings_share_no_thread_on_the_smallest_machine():
    assert divide_cores([False, True], PAIR) == [(0,), (1,)]
    assert divide_cores([False, True], ((0,), (1,))) == [(0,), (1,)]


def test_an_embedding_engine_gets_an_eighth_and_whole_cores():
    chat, embed = divide_cores([False, True], QUAD)
    assert chat == tuple(range(14))
    assert embed == (14, 15)


def test_cores_given_by_hand_are_left_out_with_their_sibling_threads():
    assert divide_cores([False], QUAD, taken={0, 1, 17}) == [tuple(range(2, 16))]


def test_more_engines_than_threads_is_an_error():
    with pytest.raises(ValueError, match="3 engines need as many cores; 2 are free"):
        divide_cores([False, False, True], PAIR)


@given(
    st.lists(st.booleans(), min_size=2, max_size=8),
    st.integers(min_value=1, max_value=64),
    st.integers(min_value=1, max_value=2),
)
def test_no_thread_twice_and_none_left_without(small, num_cores, num_threads):
    cores = tuple(tuple(n + t * num_cores for t in range(num_threads)) for n in range(num_cores))
    try:
        shares = divide_cores(small, cores)
    except ValueError:
        assert num_cores * num_threads < len(small)
        return
    given_out = [thread for share in shares for thread in share]
    assert len(given_out) == len(set(given_out))
    assert all(shares)
    assert set(given_out) <= {thread for core in cores for thread in core}


def test_this_machine_has_cores():
    assert usable_cores()
    assert parse_cores("0-2,8") == (0, 1, 2, 8)
