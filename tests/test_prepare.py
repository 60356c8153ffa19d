"""Recomputation inside what is compiled, and joint products."""

import copy

import pytest
import torch
import torch.utils.checkpoint

from engine import prepare
from policy import score
from rollout import Group


@pytest.fixture()
def compiled(tiny):
    """The tiny model with compiled decoder layers, without a code generator (that is inductor's,
    on a GPU). The vision blocks stay as they are: on CPU, attention window by window cannot be
    one graph."""
    layers = tiny[0].model.language_model.layers
    torch._dynamo.reset()
    for layer in layers:
        prepare.compile_layer(layer, backend="aot_eager")
    yield tiny[0]
    for layer in layers:
        layer.forward = layer.whole
    torch._dynamo.reset()


def gradients(model, prompt, group, on):
    for layer in model.model.language_model.layers:
        layer.recomputes = on
    model.zero_grad()
    logp = score(model, prompt, group)[0]
    logp.sum().backward()
    prepare.recompute(model, False)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return logp.detach(), found


def groups_of(lengths):
    """Completions of these lengths."""
    T = max(lengths)
    valid = torch.arange(T) < torch.tensor(lengths)[:, None]
    return Group(torch.randint(9, 40, (len(lengths), T)), valid)


def test_recomputation_is_compiled_with_the_forward(compiled, prompts, monkeypatch):
    """torch's checkpointing never runs by itself: if it did, forward and recomputation would be
    two compiled forms, whose saved tensors may differ in shape (CheckpointError at 3B and 7B, by
    luck)."""

    def outside(*_, **__):
        raise AssertionError("checkpointing ran outside the compiled layer")

    cases = [(prompts[0], [5, 3, 7]), (prompts[-1], [6])]  # a clip and an image
    gradients(compiled, prompts[0], groups_of([9, 3]), on=True)  # traced here
    monkeypatch.setattr(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", outside)
    for prompt, lengths in cases:
        group = groups_of(lengths)
        logp, found = gradients(compiled, prompt, group, on=True)
        want, exact = gradients(compiled, prompt, group, on=False)
        assert torch.allclose(logp, want, atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, exact))


def test_numbers_are_no_inputs(tiny, prompts):
    """An epsilon that became an input would be converted on the CPU, by a kernel that g++
    compiles for 20 s."""
    kinds = []

    def backend(graph, inputs):
        kinds.extend(x.dtype if isinstance(x, torch.Tensor) else type(x) for x in inputs)
        return graph.forward

    layer = tiny[0].model.language_model.layers[0]
    prepare.compile_layer(layer, backend=backend)
    prepare.recompute(tiny[0])
    score(tiny[0], prompts[0], groups_of([3, 2]))
    prepare.recompute(tiny[0], False)
    layer.forward = layer.whole
    assert len(kinds) > 10 and not {torch.float64, float, torch.SymFloat} & set(kinds)


def test_a_layer_that_recomputes_keeps_its_input_only(tiny, prompts):
    def kept(on):
        prepare.recompute(tiny[0], on)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        ):
            score(tiny[0], prompts[0], groups_of([40, 40]))[0]
        prepare.recompute(tiny[0], False)
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


def test_joint_products_equal_the_layers_own(tiny, plain):
    layers = zip(tiny[0].model.language_model.layers, plain.model.language_model.layers)
    for ours, theirs in layers:
        x = torch.randn(2, 3, theirs.hidden_size)
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            owner = "self_attn" if names[0] == "q_proj" else "mlp"
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    got = [getattr(getattr(ours, owner), name)(x) for name in names]
                want = [getattr(getattr(theirs, owner), name)(x) for name in names]
                assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want))


def test_zeros_appended_change_nothing(plain):
    """What a vision MLP of 13 columns returns, and its gradients."""
    config = copy.deepcopy(plain.config.vision_config)
    config.intermediate_size = 13
    mlp = type(plain.model.visual.blocks[0].mlp)(config, bias=True)
    x, found = torch.randn(5, config.hidden_size), []
    for _ in range(2):
        mlp.zero_grad()
        y = mlp(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in mlp.parameters())])
        prepare.round_up(mlp)
    assert "forward" in vars(mlp)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))
