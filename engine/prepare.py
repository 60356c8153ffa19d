"""A model made ready: its weights in one buffer, this project's attention, layers compiled once."""

from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.kernels import thin_linear
from engine.packing import NAMES, has_varlen
from engine.sharded import flatten


def prepare(model: nn.Module, device: torch.device | str) -> nn.Module:
    """The model on `device`, in evaluation mode (no dropout), for `policy.sample` and `score`. On
    CUDA in half precision one decoder layer and one vision block are compiled, and serve all."""
    flatten(model, device)
    model.set_attn_implementation(NAMES)
    for layer in model.model.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        multiply_together(attention.q_proj, attention.k_proj, attention.v_proj)
        multiply_together(attention.o_proj)
        multiply_together(mlp.gate_proj, mlp.up_proj)
        multiply_together(mlp.down_proj)
    for block in model.model.visual.blocks:
        if hasattr(block.mlp, "gate_proj"):             # Qwen2.5-VL's; others are fine as is
            round_up(block.mlp)
    for layer in layers_of(model):
        with_checkpointing(layer)
        if has_varlen(model.flat):
            compile_layer(layer)
    return model.eval()


def compiled_on_cuda(function, dynamic: bool = False):
    """The function, compiled where its first argument is on a GPU. dynamic: for any length."""
    compiled = torch.compile(function, dynamic=dynamic)

    @wraps(function)
    def wrapper(x: Tensor, *more):
        return (compiled if x.is_cuda else function)(x, *more)

    return wrapper


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Vision blocks and decoder layers."""
    return [*model.model.visual.blocks, *model.model.language_model.layers]


def compile_layer(layer: nn.Module, dynamic: bool = True, **how) -> None:
    """Compile what `with_checkpointing` made, for any length or for the one it meets."""
    torch._dynamo.config.recompile_limit = 512          # all layers of all models share one code,
    torch._dynamo.config.accumulated_recompile_limit = 512      # and a decoder has forms of its own
    # else a norm's epsilon becomes an input, and g++ compiles for 20 s what converts it on the CPU
    torch._dynamo.config.specialize_float = True
    # inductor may pad a product or not, by timing both: off, for one form a layer
    how = how or {"options": {"shape_padding": False}}
    # fullgraph: where the graph broke, recomputation would fall out of it
    compiled = torch.compile(layer.whole, dynamic=dynamic, fullgraph=True, **how)

    def forward(hidden_states: Tensor, **more) -> Tensor:
        if hidden_states._is_view():                    # else the first layer had a form of its own
            hidden_states = hidden_states.clone()
        return compiled(hidden_states, **more)

    layer.forward = forward


def recompute(model: nn.Module, on: bool = True) -> nn.Module:
    """Gradient checkpointing (Chen et al. 2016), on or off: layers keep their inputs only, and
    compute the rest again in the backward pass."""
    for layer in layers_of(model):
        layer.recomputes = on
    return model


def with_checkpointing(layer: nn.Module) -> None:
    """Checkpointing inside what is compiled: forward and recomputation are one graph. Outside it
    (transformers' own, up to 5.17) each would be compiled by itself, by its own guards and timings,
    and a recomputed value could have another shape than the one it stands for."""
    plain, layer.recomputes = layer.forward, False

    def forward(hidden_states: Tensor, **more) -> Tensor:
        if layer.recomputes and torch.is_grad_enabled():
            return checkpoint(lambda x: plain(x, **more), hidden_states, use_reentrant=False)
        return plain(hidden_states, **more)

    layer.whole = layer.forward = forward


def round_up(mlp: nn.Module) -> None:
    """Let a vision block's MLP multiply with zeros appended: 3,420 columns are no multiple of 8, so
    kernels would take four times as long."""
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    short = -gate.out_features % 8

    def longer(x: Tensor, own: nn.Linear) -> Tensor:
        return F.linear(x, F.pad(own.weight, (0, 0, 0, short)), F.pad(own.bias, (0, short)))

    def forward(x: Tensor) -> Tensor:
        inner = mlp.act_fn(longer(x, gate)) * longer(x, up)
        return F.linear(inner, F.pad(down.weight, (0, short)), down.bias)

    if short:
        mlp.forward = forward


def multiply_together(*linears: nn.Linear) -> None:
    """Without gradients, the first of these neighbours in `flat` multiplies for all, and the others
    take their part: a decoding step waits for small kernels as long as for large ones."""
    sizes, parts = [x.out_features for x in linears], []
    first, columns = linears[0], linears[0].in_features

    def joint(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.linear(x, first.weight, first.bias)
        weight = first.weight.as_strided((sum(sizes), columns), (columns, 1))
        bias = None if first.bias is None else first.bias.as_strided((sum(sizes),), (1,))
        parts[:] = thin_linear(x, weight, bias).split(sizes, -1)
        return parts.pop(0)

    def taking(own: nn.Linear):
        return lambda x: parts.pop(0) if parts else F.linear(x, own.weight, own.bias)

    if not all(are_adjacent(a, b) for a, b in zip(linears, linears[1:])):
        return  # sizes that are no multiples of 64: all as it was
    for linear in linears[1:]:
        linear.forward = taking(linear)
    first.forward = joint


def are_adjacent(a: nn.Linear, b: nn.Linear) -> bool:
    """Whether the weights (and biases) of b begin where those of a end."""
    pairs = [(x, y) for x, y in ((a.weight, b.weight), (a.bias, b.bias)) if x is not None]
    return all(x.data_ptr() + x.numel() * x.element_size() == y.data_ptr() for x, y in pairs)
