"""Has vLLM's Llama layers compute few rows with compact weights.

vLLM gives each linear layer on a CPU, once its weights are loaded, a function that multiplies. Within `compacting` that
function is wrapped: few rows go through `compact_kernels`, many through what vLLM chose. A decoder layer of which all
matrices are compact is then run by `CompactDecoder`, which does what lies between them in kernels as well; attention stays
vLLM's. What a layer computes is the same, in fewer and shorter steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor, nn
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from services.verifier.engine import layer_kernels
from services.verifier.engine.compact import CompactMatrix, compact
from services.verifier.engine.compact_kernels import MOST_ROWS, CompactProduct

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_DISPATCH: Final = "dispatch_cpu_unquantized_gemm"


class CompactLinear:
    """What a layer multiplies with: (values, weight, bias) as vLLM calls it, the weight left aside for few rows."""

    def __init__(self, matrix: CompactMatrix, otherwise: Linear) -> None:
        self.product, self._otherwise = CompactProduct(matrix), otherwise
        self._columns = matrix.columns

    def __call__(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """values @ weight.T + bias."""
        if values.numel() > MOST_ROWS * self._columns:
            return self._otherwise(values, weight, bias)
        product = self.product(values)
        return product if bias is None else product + bias


class CompactDecoder:
    """A decoder layer's forward; more than `MOST_ROWS` rows go the way that the layer had before."""

    def __init__(self, layer: LlamaDecoderLayer, room: _Room) -> None:
        """`room` may be that of other layers, which run before or after this one."""
        self._otherwise, self._room = layer.forward, room
        attention = layer.self_attn
        self._sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        self._rotary, self._attend = attention.rotary_emb, attention.attn
        self._enter, self._leave = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self._qkv, self._out = _product_of(attention.qkv_proj), _product_of(attention.o_proj)
        self._gate_up, self._down = _product_of(layer.mlp.gate_up_proj), _product_of(layer.mlp.down_proj)
        self._gate, self._width = layer_kernels.gated(), self._down.matrix.columns
        self._normed = room(0, self._qkv.matrix.columns).data_ptr()
        self._qkv_out = room(1, self._qkv.matrix.rows)
        self._gate_up_out = room(2, self._gate_up.matrix.rows).data_ptr()
        self._gated = room(3, self._width).data_ptr()

    def __call__(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See `LlamaDecoderLayer.forward`; `residual` is added to where it lies."""
        rows = len(hidden_states)
        if rows > MOST_ROWS:
            found: tuple[Tensor, Tensor] = self._otherwise(positions, hidden_states, residual)
            return found
        if residual is None:
            residual, hidden_states = hidden_states, torch.zeros_like(hidden_states)
        self._enter(residual, hidden_states, self._normed)
        self._qkv.into(self._qkv_out.data_ptr(), self._normed, rows)
        query, key, value = self._qkv_out[:rows].split_with_sizes(self._sizes, dim=-1)
        query, key = self._rotary(positions, query, key)
        attended = self._attend(query, key, value)
        out = torch.empty_like(residual)
        self._out.into(out.data_ptr(), attended.data_ptr(), rows)
        self._leave(residual, out, self._normed)
        self._gate_up.into(self._gate_up_out, self._normed, rows)
        self._gate(self._gate_up_out, self._gated, rows, self._width)
        self._down.into(out.data_ptr(), self._gated, rows)
        return out, residual


class _Room:
    """Memory for what layers compute on the way, the same for all of them."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], Tensor] = {}

    def __call__(self, number: int, columns: int) -> Tensor:
        return self._held.setdefault((number, columns), torch.empty(MOST_ROWS, columns))


class _Norm:
    def __init__(self, norm: RMSNorm) -> None:
        self._kernel, self._weight = layer_kernels.add_norm(), norm.weight.detach()
        self._eps = norm.variance_epsilon

    def __call__(self, state: Tensor, added: Tensor, normed: int) -> None:
        self._kernel(
            state.data_ptr(), added.data_ptr(), self._weight.data_ptr(), normed, *state.shape, self._eps
        )


def _product_of(linear: nn.Module) -> CompactProduct:
    found: CompactProduct = linear.cpu_linear.product  # type: ignore[union-attr,assignment]
    return found


def run_compact(model: nn.Module) -> None:
    """Have `CompactDecoder` run the decoder layers that it can, once they have compact weights."""
    room = _Room()
    for layer in model.modules():
        if type(layer) is LlamaDecoderLayer and _can_be_run(layer):
            layer.forward = CompactDecoder(layer, room)


def _can_be_run(layer: LlamaDecoderLayer) -> bool:
    """Not those of models that do something else in them."""
    if type(layer.self_attn) is not LlamaAttention or type(layer.mlp) is not LlamaMLP:
        return False
    linears = [
        layer.self_attn.qkv_proj,
        layer.self_attn.o_proj,
        layer.mlp.gate_up_proj,
        layer.mlp.down_proj,
    ]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    return all(
        isinstance(getattr(linear, "cpu_linear", None), CompactLinear) and linear.bias is None
        for linear in linears
    ) and all(norm.has_weight and norm.variance_size_override is None for norm in norms)


@contextmanager
def compacting(wanted: bool) -> Iterator[list[CompactMatrix]]:
    """Models that are loaded meanwhile multiply with compact weights, where `wanted`; yields those that are found."""
    found: list[CompactMatrix] = []
    if not wanted:
        yield found
        return
    vllms_own = getattr(utils, _DISPATCH)

    def dispatch(layer: Any, remove_weight: bool) -> None:
        matrix = compact(layer.weight)
        vllms_own(layer, remove_weight)
        if matrix is not None:
            found.append(matrix)
            layer.cpu_linear = CompactLinear(matrix, layer.cpu_linear)

    with mock.patch.object(utils, _DISPATCH, dispatch):
        yield found
