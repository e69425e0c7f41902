"""Sharing out what replicas hold alike: complete, even, and the same on every rank."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given
from snapd_client.state.replicas import SHARED_BYTES_MIN, share_out

names = st.text("abc.", min_size=1, max_size=6)
sizes = st.dictionaries(names, st.integers(0, 1 << 20), max_size=30)
node = st.sets(st.integers(0, 15), min_size=1, max_size=8)


@given(sizes, node, st.data())
def test_every_name_has_one_holder_among_its_replicas_on_the_node(
    found: dict[str, int], ranks: set[int], data: st.DataObject
) -> None:
    ranks_of = {name: tuple(data.draw(st.sets(st.integers(0, 15), max_size=8))) for name in found}
    holders = share_out(found, ranks_of, sorted(ranks))
    for name, nbytes in found.items():
        here = ranks & set(ranks_of[name])
        assert (name in holders) == (len(here) > 1 and nbytes >= SHARED_BYTES_MIN)
        assert name not in holders or holders[name] in here
    again = share_out(
        dict(reversed(found.items())), dict(reversed(ranks_of.items())), sorted(ranks, reverse=True)
    )
    assert again == holders, "the order in which a rank meets the names plays a part"


@given(sizes, node)
def test_loads_differ_by_one_tensor_at_most(found: dict[str, int], ranks: set[int]) -> None:
    holders = share_out(found, dict.fromkeys(found, tuple(ranks)), tuple(ranks))
    load = dict.fromkeys(ranks, 0)
    for name, holder in holders.items():
        load[holder] += found[name]
    largest = max((found[name] for name in holders), default=0)
    assert max(load.values()) - min(load.values()) <= largest


@given(
    st.dictionaries(
        names,
        st.tuples(st.integers(4096, 1 << 20), st.sampled_from(["both", "rows", "columns"])),
        max_size=20,
    ),
    st.dictionaries(
        st.integers(0, 3), st.dictionaries(st.text("xyz", min_size=1, max_size=4), st.integers(4096, 1 << 20))
    ),
)
def test_ranks_of_a_mesh_agree_though_each_sees_names_of_its_own(
    common: dict[str, tuple[int, str]], own: dict[int, dict[str, int]]
) -> None:
    """Two by two ranks: a tensor is held by all, by a row or by a column; each row has tensors that no other has."""
    chosen = []
    for rank in range(4):
        row, column = (rank // 2 * 2, rank // 2 * 2 + 1), (rank % 2, rank % 2 + 2)
        sets = {"both": tuple(range(4)), "rows": row, "columns": column}
        found = {name: size for name, (size, _) in common.items()} | own.get(row[0], {})
        ranks_of = {name: sets[common[name][1]] if name in common else row for name in found}
        chosen.append((share_out(found, ranks_of, range(4)), ranks_of))
    for holders, ranks_of in chosen:
        for name, holder in holders.items():
            assert all(chosen[other][0][name] == holder for other in ranks_of[name]), "nobody keeps it"
