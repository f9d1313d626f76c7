import pytest
from hypothesis import given
from hypothesis import strategies as st

from multicard import partition
from multicard.errors import ConfigError

sizes, parts = st.integers(0, 300), st.integers(1, 12)
heads = st.tuples(st.integers(1, 8), st.integers(1, 8)).map(lambda pair: (pair[0] * pair[1], pair[0]))


@given(sizes, parts)
def test_split_covers_every_row_once_and_evenly(size, parts):
    shares = partition.split(size, parts)
    assert [row for share in shares for row in share] == list(range(size))
    lengths = partition.split_sizes(size, parts)
    assert lengths == tuple(map(len, shares))
    assert list(lengths) == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@pytest.mark.parametrize(("size", "parts"), [(-1, 2), (3, 0)])
def test_split_refuses_nonsense(size, parts):
    with pytest.raises(ConfigError, match=f"{size} rows in {parts} parts"):
        partition.split(size, parts)


@given(heads, parts)
def test_every_query_head_finds_its_own_key_value_head(heads, parts):
    heads, kv_heads = heads
    shards = partition.split_heads(heads, kv_heads, parts)
    assert [h for shard in shards for h in shard.query] == list(range(heads))
    group = heads // kv_heads
    for shard in shards:
        read = {}
        for query, kv in shard.segments:
            assert len(query) % len(kv) == 0
            for i, q in enumerate(query):
                read[shard.query[q]] = shard.kv[kv[i // (len(query) // len(kv))]]
        assert read == {h: h // group for h in shard.query}
        assert set(shard.kv) == set(read.values())
        assert len(shard.segments) <= 3


def test_heads_that_do_not_divide():
    first, second = partition.split_heads(9, 3, 2)
    assert (first.query, first.kv) == (range(0, 5), range(0, 2))
    assert (second.query, second.kv) == (range(5, 9), range(1, 3))
    assert not first.uniform


def test_more_ranks_than_heads_leaves_some_without():
    assert [len(shard.query) for shard in partition.split_heads(2, 1, 3)] == [1, 1, 0]
    assert partition.split_heads(2, 1, 3)[2].segments == ()


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 2), (0, 1), (3, 0)])
def test_heads_must_be_a_multiple_of_key_value_heads(heads, kv_heads):
    with pytest.raises(ConfigError, match="must be a multiple"):
        partition.split_heads(heads, kv_heads, 2)


@given(sizes, parts, st.sampled_from(partition.ORDERS))
def test_sequence_shares_cover_every_position_once(seq_len, parts, order):
    shares = partition.split_sequence(seq_len, parts, order)
    assert sorted(p for spans in shares for span in spans for p in span) == list(range(seq_len))
    assert partition.sequence_sizes(seq_len, parts, order) == tuple(sum(map(len, spans)) for spans in shares)
    assert all(span for spans in shares for span in spans)


@given(st.integers(1, 40), st.integers(1, 8))
def test_zigzag_gives_every_rank_the_same_causal_work(piece, parts):
    shares = partition.split_sequence(2 * parts * piece, parts, "zigzag")
    assert len({sum(p + 1 for span in spans for p in span) for spans in shares}) == 1


def test_an_unknown_order_is_refused():
    with pytest.raises(ConfigError, match="order='diagonal'"):
        partition.split_sequence(8, 2, "diagonal")


def test_merge_spans():
    assert partition.merge_spans([range(0, 2), range(2, 5), range(5, 5), range(7, 9)]) == (range(0, 5), range(7, 9))
