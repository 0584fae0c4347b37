"""What lies between a layer's matrices: sums, norms and gates come out as PyTorch's do."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from services.verifier.engine import layer_kernels

sizes = pytest.mark.parametrize(("rows", "columns"), [(1, 16), (1, 576), (3, 64), (24, 576)])


@sizes
def test_a_sum_is_kept_and_normed(rows: int, columns: int) -> None:
    random = torch.Generator().manual_seed(columns)
    state, added = (torch.randn(rows, columns, generator=random) * 30 for _ in range(2))
    weight, normed, whole = torch.randn(columns, generator=random), torch.empty(rows, columns), state + added
    addresses = [each.data_ptr() for each in (state, added, weight, normed)]
    layer_kernels.add_norm()(*addresses, rows, columns, 1e-5)
    assert torch.equal(state, whole)
    torch.testing.assert_close(
        normed, functional.rms_norm(whole, (columns,), weight, 1e-5), rtol=1e-6, atol=1e-6
    )


def test_the_norm_of_nothing_is_nothing() -> None:
    state, normed = torch.zeros(1, 32), torch.empty(1, 32)
    added, weight = torch.zeros(1, 32), torch.ones(32)
    layer_kernels.add_norm()(*(each.data_ptr() for each in (state, added, weight, normed)), 1, 32, 1e-5)
    assert torch.equal(normed, torch.zeros(1, 32))


@sizes
def test_the_gate_is_silu_times_up(rows: int, columns: int) -> None:
    gate_up = torch.randn(rows, 2 * columns, generator=torch.Generator().manual_seed(columns)) * 8
    out = torch.empty(rows, columns)
    layer_kernels.gated()(gate_up.data_ptr(), out.data_ptr(), rows, columns)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(out, functional.silu(gate) * up, rtol=1e-6, atol=1e-7)


def test_gates_far_out_are_open_or_closed() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 1e30]).repeat(2)
    gate_up, out = torch.cat((gate, torch.ones(16)))[None], torch.empty(1, 16)
    layer_kernels.gated()(gate_up.data_ptr(), out.data_ptr(), 1, 16)
    torch.testing.assert_close(out, functional.silu(gate)[None], rtol=1e-6, atol=1e-6)
