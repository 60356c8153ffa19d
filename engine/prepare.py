"""TEMPORARY"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from engine.packing import NAMES, has_varlen
from engine.sharded import flatten


def prepare(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Weights in one buffer on `device`, this project's attention, and one product where several share their input.

    On CUDA in half precision, one decoder layer and one vision block are compiled, for any length, and serve all: norms,
    rotations and activations fuse. The first step pays for it.
    """
    flatten(model, device)
    model.set_attn_implementation(NAMES)
    for layer in model.model.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        multiply_together(attention.q_proj, attention.k_proj, attention.v_proj)
        multiply_together(mlp.gate_proj, mlp.up_proj)
    if has_varlen(model.flat):
        torch._dynamo.config.recompile_limit = 64       # with and without gradient, checkpointing, text alone, ..
        for layer in (*model.model.language_model.layers, *model.model.visual.blocks):
            layer.compile(dynamic=True)
    return model.eval()


def multiply_together(*linears: nn.Linear) -> None:
    """Without gradients, the first of these neighbours in `flat` multiplies for all and the others take their part.

    A decoding step waits for small kernels as long as for large ones; the model's own forward stays as it is.
    """
    sizes, parts = [x.out_features for x in linears], []
    first, columns = linears[0], linears[0].in_features

    def joint(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.linear(x, first.weight, first.bias)
        weight = first.weight.as_strided((sum(sizes), columns), (columns, 1))
        bias = None if first.bias is None else first.bias.as_strided((sum(sizes),), (1,))
        parts[:] = F.linear(x, weight, bias).split(sizes, -1)
        return parts.pop(0)

    for linear, after in zip(linears, linears[1:]):
        for a, b in ((linear.weight, after.weight), (linear.bias, after.bias)):
            if a is not None and a.data_ptr() + a.numel() * a.element_size() != b.data_ptr():
                return                                  # not neighbours (sizes that are no multiples of 64): as it was
        after.forward = lambda x, own=after: parts.pop(0) if parts else F.linear(x, own.weight, own.bias)
    first.forward = joint


