"""The optimizer against plain AdamW, and over ranks (gloo, one process each)."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from engine import sharded
from engine.sharded import ShardedAdamW, flatten
from run.distributed import distributed


def new_module(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(33, 40), nn.LayerNorm(40), nn.Linear(40, 7), nn.Linear(7, 129)
    ).to(dtype)


def gradients(module, step):
    """The same gradients for the same step, whatever the module's precision: a lasting direction
    and noise."""
    lasting, noise = torch.Generator().manual_seed(-1), torch.Generator().manual_seed(step)
    return [
        (torch.randn(p.shape, generator=lasting) + 0.3 * torch.randn(p.shape, generator=noise)).to(
            p.dtype
        )
        for p in module.parameters()
    ]


def train(module, steps, lr, **more):
    flatten(module, "cpu")
    optimizer = ShardedAdamW(module, lr, weight_decay=0.01, **more)
    for step in range(steps):
        for p, g in zip(module.parameters(), gradients(module, step)):
            p.grad = g
        optimizer.step(lr)
        optimizer.zero_grad()
    return optimizer


def reference(module, steps, lr, seen=lambda g: g):
    """Plain AdamW, norms and biases not decayed; `seen` is what the gradients look like."""
    groups = [
        {"params": [p for p in module.parameters() if (p.ndim > 1) == decayed], "weight_decay": wd}
        for decayed, wd in ((True, 0.01), (False, 0.0))
    ]
    adam = torch.optim.AdamW(groups, lr=lr)
    for step in range(steps):
        for p, g in zip(module.parameters(), gradients(module, step)):
            p.grad = seen(g)
        adam.step()
    return module


@pytest.mark.parametrize("at_once", [1 << 26, 100, 7])
def test_fp32_equals_adamw(monkeypatch, at_once):
    monkeypatch.setattr(sharded, "AT_ONCE", at_once)  # however many weights are stepped together
    module = new_module()
    train(module, 20, 1e-3)
    for a, b in zip(module.parameters(), reference(new_module(), 20, 1e-3).parameters()):
        assert torch.allclose(a, b, atol=1e-7)


def test_bf16_follows_fp32_at_2e_6_and_plain_bf16_does_not():
    """200 steps of 2e-6: with fp32 masters the bf16 weights are the rounded fp32 ones; without,
    they hardly move."""
    start = new_module(torch.bfloat16)
    exact = new_module(torch.bfloat16).float()
    reference(
        exact, 200, 2e-6, seen=lambda g: g.to(torch.bfloat16).float()
    )  # the gradients are bf16 in both
    sharded, naive = new_module(torch.bfloat16), reference(new_module(torch.bfloat16), 200, 2e-6)
    train(sharded, 200, 2e-6)

    def movement(module):
        return torch.cat(
            [
                (a.float() - b.float()).flatten()
                for a, b in zip(module.parameters(), start.parameters())
            ]
        )

    for a, b in zip(sharded.parameters(), exact.parameters()):
        assert torch.equal(a, b.to(torch.bfloat16))
    moved = torch.cat(
        [(a - b.float()).flatten() for a, b in zip(exact.parameters(), start.parameters())]
    )
    assert moved.abs().max() > 1e-4
    stuck = (movement(naive) == 0).float().mean(), (movement(sharded) == 0).float().mean()
    assert stuck[0] > 0.95 and stuck[1] < 0.6
    along = [
        ((movement(m) @ moved) / (moved @ moved)).item() for m in (sharded, naive)
    ]  # how far along the exact path
    assert along[0] > 0.5 and along[1] < 0.05


def test_flat_weights_are_neighbours_in_order():
    module = new_module()
    before = [p.clone() for p in module.parameters()]
    flatten(module, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before))
    places = [
        (p.data_ptr() - module.flat.data_ptr()) // 4
        for p in sorted(module.parameters(), key=lambda p: p.ndim < 2)
    ]
    assert places == sorted(places) and all(place % 64 == 0 for place in places)
    with torch.no_grad():
        module.flat.fill_(2.0)
    assert all((p == 2).all() for p in module.parameters())


def test_grad_norm_and_scaling():
    module = new_module()
    flatten(module, "cpu")
    optimizer = ShardedAdamW(module, 0.1)
    for p in module.parameters():
        p.grad = torch.full_like(p, 0.5)
    count = sum(p.numel() for p in module.parameters())
    assert optimizer.grad_norm() == pytest.approx(0.5 * count**0.5, rel=1e-6)
    next(module.parameters()).grad[0, 0] = float("nan")
    assert not optimizer.grad_norm() < float("inf")


def held(optimizer):
    """How many weights have their state here."""
    return sum(len(part.state[0]) for part in optimizer.parts)


def test_frozen_weights_have_no_state_and_stay(monkeypatch):
    monkeypatch.setattr(sharded, "AT_ONCE", 1000)
    module, start = new_module(), new_module()
    module[0].requires_grad_(False)
    optimizer = train(module, 3, 1e-3)
    total, frozen = (sum(p.numel() for p in m.parameters()) for m in (module, module[0]))
    assert held(optimizer) == total - frozen and len(optimizer.parts) == -(
        -(total - frozen) // 1000
    )
    moved = [not torch.equal(a, b) for a, b in zip(module.parameters(), start.parameters())]
    assert moved == [False, False] + [True] * (len(moved) - 2)


def test_offloaded_state_makes_the_same_weights():
    module, other = new_module(torch.bfloat16), new_module(torch.bfloat16)
    optimizer = train(module, 5, 1e-3, offload=True)
    train(other, 5, 1e-3)
    assert all(x.device.type == "cpu" for part in optimizer.parts for x in part.state)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters()))


def test_state_round_trip():
    module = new_module()
    optimizer = train(module, 3, 1e-3)
    state, weights = optimizer.state_dict(), [p.detach().clone() for p in module.parameters()]
    again = new_module()
    flatten(again, "cpu")
    with torch.no_grad():
        for p, w in zip(again.parameters(), weights):
            p.copy_(w)
    other = ShardedAdamW(again, 1e-3, 0.01)
    other.load_state_dict(torch.load(save_and(state), weights_only=True))
    for m, o in ((module, optimizer), (again, other)):
        for p, g in zip(m.parameters(), gradients(m, 99)):
            p.grad = g
        o.step(1e-3)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters()))
    state["world"] = 3
    with pytest.raises(ValueError, match="rank 0 of 3"):
        other.load_state_dict(state)


def save_and(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def one_rank(rank, world, port, queue):
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    distributed()
    module = new_module(torch.bfloat16)
    optimizer = train(module, 30, 1e-3)
    queue.put((rank, module.flat[:7000].float().tolist(), optimizer.grad_norm(), held(optimizer)))
    dist.barrier()
    dist.destroy_process_group()


def test_one_two_and_three_ranks_make_the_same_weights():
    results = {}
    for world in (2, 3):
        context = mp.get_context("spawn")
        queue, port = context.Queue(), free_port()
        processes = [
            context.Process(target=one_rank, args=(rank, world, port, queue))
            for rank in range(world)
        ]
        [p.start() for p in processes]
        results[world] = [queue.get(timeout=120) for _ in range(world)]
        [p.join(60) for p in processes]
        assert all(p.exitcode == 0 for p in processes)
    alone = new_module(torch.bfloat16)
    train(alone, 30, 1e-3)
    want, total = alone.flat[:7000].float().tolist(), sum(p.numel() for p in alone.parameters())
    for found in results.values():
        assert all(weights == want for _, weights, _, _ in found)
        assert sum(count for *_, count in found) == total  # each element has one owner
