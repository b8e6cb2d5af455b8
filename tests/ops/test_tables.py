"""Shift tables and ghost split, against the official tables and by hand."""

import pytest
import torch
from safetensors.torch import load_file

from swconv.ops import ShiftTables, ghost_split, tap_count

EXTENTS = (51, 49, 47, 13)
OFFICIAL = {"tiny": (80, 160, 320, 640), "small": (96, 192, 384, 768), "base": (128, 256, 512, 1024),
            "v1tiny_x1.3": (124, 249, 499, 998)}


@pytest.fixture(scope="module")
def golden():
    return load_file("tests/golden/sw_index_tables.safetensors")


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("network", OFFICIAL)
def test_drawn_tables_and_split_are_the_official_ones(golden, network, stage):
    mixed, ghost = ghost_split(OFFICIAL[network][stage], 0.23, even=network != "v1tiny_x1.3")
    tables = ShiftTables.draw(len(mixed), tap_count(EXTENTS[stage], 3), edges=4)
    pads = torch.cat(tables.pads(EXTENTS[stage], 3, padding=2), dim=1)
    expected = {"pad_hv": pads, "idx_identit": tables.pick, "rep": mixed, "ghost": ghost}
    for name, ours in expected.items():
        assert torch.equal(ours.long(), golden[f"{network}.stage{stage}.{name}"].long()), name


def test_first_permutation_is_torchs_randperm_after_seed_123():
    generator = torch.Generator().manual_seed(123)
    tables = ShiftTables.draw(channels=2, taps=17, edges=1)
    assert torch.equal(tables.slot_h[0, 0], torch.randperm(17, generator=generator))
    assert torch.equal(tables.slot_h[0, 1], torch.randperm(17, generator=generator))


def test_drawing_leaves_the_global_generators_alone():
    before = torch.get_rng_state()
    ShiftTables.draw(8, 5, 4)
    ghost_split(8, 0.23)
    assert torch.equal(before, torch.get_rng_state())


def test_reversed_order_puts_the_last_filter_first_in_v_only():
    tables = ShiftTables.arrange(channels=2, taps=3, edges=1, order="reversed")
    assert tables.slot_h.tolist() == [[[0, 1, 2], [0, 1, 2]]]
    assert tables.slot_v.tolist() == [[[2, 1, 0], [2, 1, 0]]]


def test_shuffle_v_keeps_h_in_order_and_permutes_v():
    tables = ShiftTables.arrange(channels=5, taps=7, edges=1, order="shuffle_v")
    assert (tables.slot_h == torch.arange(7)).all()
    assert (tables.slot_v.sort(dim=2).values == torch.arange(7)).all()
    assert not (tables.slot_v == torch.arange(7)).all()


def test_pads_place_slot_j_at_its_offset():
    tables = ShiftTables.arrange(channels=1, taps=3, edges=1, order="reversed")
    pad_h, pad_v = tables.pads(extent=7, small=3, padding=2)
    assert pad_h[:, 0].tolist() == [1, -2, -5]                        # 7 // 2 - 3 j - 2
    assert pad_v[:, 0].tolist() == [-5, -2, 1]


def test_mixing_counts_every_filter_once_per_edge_and_direction():
    mixing = ShiftTables.draw(channels=6, taps=5, edges=3).mixing()
    assert mixing.shape == (6, 11, 5)
    assert (mixing[:, :5].sum(1) == 3).all()
    assert (mixing[:, 5:10].sum(2) == 3).all()
    assert (mixing[:, 10].sum(1) == 3).all()


@pytest.mark.parametrize(("channels", "ratio", "even", "mixed"), [(9, 0.0, True, 8), (9, 0.0, False, 9), (10, 0.5, True, 4),
                                                                  (24, 0.23, False, 19)])
def test_ghost_split_rounds_as_its_skeleton_does(channels, ratio, even, mixed):
    ours, ghost = ghost_split(channels, ratio, even)
    assert len(ours) == mixed
    assert sorted([*ours.tolist(), *ghost.tolist()]) == list(range(channels))


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: ShiftTables.arrange(2, 3, 1, "sorted"), 'order must be "shuffled"'),
    (lambda: ShiftTables.arrange(2, 3, 2, "reversed"), "one edge, got edges = 2"),
    (lambda: ShiftTables.draw(0, 3, 2), "channels must be at least 1"),
    (lambda: ShiftTables.draw(2, 3, 2).pads(13, 3, 2), "needs 5 taps, got tables of 3"),
    (lambda: ghost_split(8, 1.0), r"must lie in \[0, 1\)"),
    (lambda: ghost_split(2, 0.9), "leaves none"),
])
def test_wrong_arguments_are_told_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
