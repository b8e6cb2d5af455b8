"""The strip form equals the two-step form, values and gradients, with full and with half padding."""

import pytest
import torch

from swconv.ops import (
    ShiftTables,
    assemble,
    assemble_ref,
    half_border,
    native,
    shift_add_ref,
    strip_branches,
    strip_branches_ref,
    strip_mix,
    tap_count,
)

SHAPES = [(51, 3, 14, 11), (49, 3, 7, 9), (13, 3, 1, 12), (13, 5, 6, 6), (47, 5, 5, 8), (7, 5, 3, 1), (5, 3, 9, 9),
          (23, 7, 9, 12), (7, 7, 4, 4)]


def forms(extent: int, small: int, height: int, width: int, padding: str, strips=strip_branches):
    """h, v, i by both forms from the same filters, with their inputs."""
    torch.manual_seed(0)
    channels, edges = 3, 3
    taps = tap_count(extent, small)
    x = torch.randn(2, channels, height, width, dtype=torch.float64, requires_grad=True)
    filters = torch.randn(channels * taps, 1, small, small, dtype=torch.float64, requires_grad=True)
    tables = ShiftTables.draw(channels, taps, edges)
    pad = small - 1 if padding == "full" else small // 2
    maps = torch.nn.functional.conv2d(x, filters, padding=pad, groups=channels)
    two_step = shift_add_ref(maps, *tables.pads(extent, small, pad), tables.pick, pad - small // 2)
    kernels = assemble(filters, tables.mixing().double())
    h, v, i = strips(x, *kernels, extent // 2, extent // 2)
    if padding == "half":
        h = h - half_border(x, kernels[0], extent)
        v = v - half_border(x.transpose(2, 3), kernels[1].transpose(2, 3), extent).transpose(2, 3)
    return (x, filters), two_step, (h, v, i)


@pytest.mark.parametrize("form", [strip_branches, strip_branches_ref])
@pytest.mark.parametrize("padding", ["full", "half"])
@pytest.mark.parametrize("shape", SHAPES)
def test_strips_are_the_two_step_form(shape, padding, form):
    inputs, two_step, strips = forms(*shape, padding, form)
    for a, b in zip(two_step, strips, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    upstream = [torch.randn_like(part) for part in two_step]
    losses = [sum((part * g).sum() for part, g in zip(parts, upstream, strict=True)) for parts in (two_step, strips)]
    for a, b in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_half_padding_loses_what_filters_centred_outside_the_map_see():
    _, full, _ = forms(7, 3, 16, 16, "full")
    _, half, _ = forms(7, 3, 16, 16, "half")
    gap = (full[0] - half[0]).abs().amax((0, 1, 2))                   # by column of the horizontal strip
    # Slots are displaced by -2, 1, 4: centres -1 and 16 belong to columns 1 and to 15, 12.
    assert (gap > 1e-12).nonzero().flatten().tolist() == [1, 12, 15]


def test_one_hot_strip_reads_the_pixel_at_its_offset():
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[0, 0, 2, 4] = 1
    kernel_h = torch.zeros(1, 1, 3, 6, dtype=torch.float64)
    kernel_h[0, 0, 1, 5] = 1                                          # anchor 2: reads 3 px to the right
    zero_v, zero_c = torch.zeros(1, 1, 6, 3, dtype=torch.float64), torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    h, v, i = strip_branches(x, kernel_h, zero_v, zero_c, anchor_h=2, anchor_v=2)
    assert h[0, 0].nonzero().tolist() == [[2, 1]]
    assert not v.any()
    assert not i.any()


def test_mix_is_the_sum_of_the_branches_and_a_bias():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    kernels = [torch.randn(3, 1, *size, dtype=torch.float64) for size in ((5, 9), (9, 5), (3, 3))]
    bias = torch.randn(3, dtype=torch.float64)
    expected = sum(strip_branches_ref(x, *kernels, 4, 4)) + bias[:, None, None]
    torch.testing.assert_close(strip_mix(x, *kernels, bias), expected, atol=1e-12, rtol=1e-12)


def test_edges_only_add_in_weight_space():
    filters = torch.randn(4 * 5, 1, 3, 3, dtype=torch.float64)
    both = ShiftTables.draw(4, 5, edges=2)
    single = [ShiftTables(both.slot_h[e : e + 1], both.slot_v[e : e + 1], both.pick[:, e : e + 1]) for e in (0, 1)]
    parts = [assemble(filters, tables.mixing().double()) for tables in single]
    for summed, *of_edges in zip(assemble(filters, both.mixing().double()), *parts, strict=True):
        torch.testing.assert_close(summed, sum(of_edges), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("sizes", "anchor", "sentence"), [
    (((4, 9), (9, 3), (3, 3)), None, "odd N and K"),
    (((3, 9), (9, 3), (3, 5)), None, "odd N and K"),
    (((3, 9), (9, 3), (3, 3)), 9, "anchors must lie on the strips"),
])
def test_kernels_that_do_not_fit_are_refused(sizes, anchor, sentence):
    kernels = [torch.zeros(2, 1, *size) for size in sizes]
    with pytest.raises(ValueError, match=sentence):
        strip_branches(torch.zeros(1, 2, 4, 4), *kernels, anchor_h=anchor)


def test_kernels_of_another_width_are_refused():
    kernels = [torch.zeros(3, 1, *size) for size in ((3, 9), (9, 3), (3, 3))]
    with pytest.raises(ValueError, match=r"got x \(1, 2, 4, 4\)"):
        strip_branches(torch.zeros(1, 2, 4, 4), *kernels)


@pytest.mark.parametrize(("small", "taps", "rep"), [(3, 17, 3), (5, 11, 3), (7, 2, 3), (9, 3, 3), (3, 5, 18)])
def test_compiled_assembly_is_the_matrix_product_with_its_gradients(small, taps, rep):
    torch.manual_seed(0)
    mixing = ShiftTables.draw(20, taps, 4).mixing().double()
    branches = [torch.randn(20 * taps, 1, small, small, dtype=torch.float64, requires_grad=True) for _ in range(rep)]
    got, wanted = assemble(branches, mixing), assemble_ref(sum(branches), mixing)
    upstream = [torch.randn_like(kernel) for kernel in wanted]
    for a, b in zip((*got, *torch.autograd.grad(got, branches, upstream)),
                    (*wanted, *torch.autograd.grad(wanted, branches, upstream)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


F, MIX = torch.zeros(20, 1, 3, 3), ShiftTables.draw(4, 5, 2).mixing()


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: assemble([F, F[:15]], MIX), "got filters (20, 1, 3, 3), (15, 1, 3, 3) and mixing (4, 11, 5). Were"),
    (lambda: assemble([], MIX), "got filters none and mixing (4, 11, 5)."),
    (lambda: assemble(torch.tensor(1.0), MIX), "got filters () and mixing (4, 11, 5)."),
    (lambda: assemble(F[..., :2, :2], MIX), "needs filters (R * n, 1, N, N) with odd N"),
    (lambda: assemble(F, MIX[0]), "got filters (20, 1, 3, 3) and mixing (11, 5)."),
    (lambda: assemble(F, MIX[:, :-1]), "got filters (20, 1, 3, 3) and mixing (4, 10, 5)."),
    (lambda: assemble([F, F.double()], MIX), "got torch.float32 on cpu, torch.float64 on cpu, torch.float32 on cpu."),
    (lambda: assemble(F.long(), MIX.long()), "one floating-point dtype on one device, got torch.int64 on cpu"),
    (lambda: assemble(F, MIX.to("meta")), "got torch.float32 on cpu, torch.float32 on meta."),
])
def test_filters_of_another_layer_are_refused(call, sentence):
    with pytest.raises(ValueError) as raised:                         # noqa: PT011  the sentence is compared below
        call()
    assert sentence in str(raised.value)


def plus_of(x, filters, mixing):
    """From x and the filters, as a layer does."""
    return torch.stack(strip_branches(x, *assemble(filters, mixing), 7, 7))


def test_gradients_are_the_same_by_either_way_through_autograd(monkeypatch):
    torch.manual_seed(0)
    mixing = ShiftTables.draw(4, 5, 2).mixing()
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 4, 9, 8), (20, 1, 3, 3), (20, 1, 3, 3))]
    bias = torch.randn(4, requires_grad=True)

    def loss(x, *filters):
        kernels = assemble(list(filters), mixing)
        return plus_of(x, list(filters), mixing).square().sum() + strip_mix(x, *kernels, bias, 7, 7).square().sum()

    by_function = torch.autograd.grad(loss(*leaves), [*leaves, bias])
    monkeypatch.setattr(native, "call", lambda op, *arguments: getattr(torch.ops.swconv, op)(*arguments))
    by_library = torch.autograd.grad(loss(*leaves), [*leaves, bias])
    assert all(torch.equal(a, b) for a, b in zip(by_function, by_library, strict=True))


def test_nothing_is_kept_for_a_gradient_that_nobody_asks_for():
    mixing, filters, x = ShiftTables.draw(4, 5, 2).mixing(), torch.randn(20, 1, 3, 3), torch.randn(1, 4, 9, 9)
    assert not plus_of(x, filters, mixing).requires_grad
    filters.requires_grad_()
    assert plus_of(x, filters, mixing).requires_grad
    with torch.no_grad():
        assert not plus_of(x, filters, mixing).requires_grad
