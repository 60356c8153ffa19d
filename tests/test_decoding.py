"""Sampling: distributions worked out by hand and by sorting, random numbers, blocks of slots."""

import pytest
import torch

from engine.decoding import border_by_bits, choose, inverse_cdf, nucleus_border

NONE = torch.zeros(5).bool()


def spread_evenly(logits, banned, temperature, top_p, top_k, n=4001):
    """How often each token comes out when the draws go evenly through [0, 1): its probability,
    to 1/n."""
    draws = (torch.arange(n) + 0.5) / n
    token, logp = choose(logits.expand(n, -1), draws, banned, temperature, top_p, top_k)
    assert torch.allclose(
        logp, logits.log_softmax(-1)[token]
    )  # temperature 1, the whole vocabulary
    return torch.bincount(token, minlength=logits.shape[-1]) / n


@pytest.mark.parametrize(
    "temperature, top_p, top_k, want",
    [
        (1.0, 1.0, 0, [0.1, 0.4, 0.2, 0.25, 0.05]),
        (1.0, 0.8, 0, [0, 40 / 85, 20 / 85, 25 / 85, 0]),  # 0.4 + 0.25 < 0.8, so 0.2 still belongs
        (1.0, 0.65, 0, [0, 40 / 65, 0, 25 / 65, 0]),  # 0.4 + 0.25 has reached it
        (1.0, 0.01, 0, [0, 1, 0, 0, 0]),  # few can be too few, never none
        (1.0, 1.0, 3, [0, 40 / 85, 20 / 85, 25 / 85, 0]),
        (1.0, 0.75, 3, [0, 40 / 65, 0, 25 / 65, 0]),  # 0.75 of the three's 0.85 is 0.6375
        (0.5, 1.0, 2, [0, 1600 / 2225, 0, 625 / 2225, 0]),  # temperature 0.5 squares
        (0.5, 0.5, 0, [0, 1, 0, 0, 0]),  # 0.16 of 0.275
        (0.0, 0.95, 50, [0, 1, 0, 0, 0]),
        (1.0, 0.95, 5, [10 / 95, 40 / 95, 20 / 95, 25 / 95, 0]),
    ],
)
def test_distributions_by_hand(temperature, top_p, top_k, want):
    logits = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05]).log() + 3
    top_p += 1e-6 * (top_p == 0.65)  # 0.4 + 0.25 is 0.65000004 in fp32
    top_p -= 2e-6 * (top_p > 0.65 and top_p < 0.651)
    got = spread_evenly(logits, NONE, temperature, top_p, top_k)
    assert (got - torch.tensor(want)).abs().max() < 5e-4
    assert all((g > 0) == (w > 0) for g, w in zip(got.tolist(), want))


def sorted_nucleus(p, top_p, top_k):
    """transformers' TopKLogitsWarper, then its TopPLogitsWarper."""
    ordered, index = p.sort(descending=True)
    if top_k:
        ordered[top_k:] = 0
    ordered = ordered / ordered.sum()
    inside = ordered.cumsum(0) - ordered < top_p
    want = torch.zeros_like(p).scatter(0, index, ordered * inside)
    return want / want.sum()


@pytest.mark.parametrize(
    "top_p, top_k", [(0.95, 0), (0.3, 0), (1.0, 0), (0.95, 50), (1.0, 7), (0.5, 200)]
)
def test_a_flat_nucleus_is_exact(top_p, top_k):
    """Hundreds of tokens are needed to reach top_p: where drawing until one fits would run out
    of draws."""
    torch.manual_seed(0)
    logits, banned = torch.randn(900), torch.zeros(900).bool()
    banned[7], logits[7] = True, 20.0
    want = sorted_nucleus(logits.double().masked_fill(banned, -torch.inf).softmax(-1), top_p, top_k)
    got = spread_evenly(logits, banned, 1.0, top_p, top_k)
    assert (got - want).abs().max() < 5e-4
    assert (got[want == 0] == 0).all() and (got[want > 6e-4] > 0).all()


@pytest.mark.parametrize("border_of", [nucleus_border, border_by_bits])     # of CPUs, of GPUs
def test_the_border_is_the_last_that_reaches_top_p(border_of):
    p = torch.tensor(
        [[0.5, 0.3, 0.15, 0.05], [1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [1e-30, 1, 0, 1e-20]]
    )
    for top_p in (0.2, 0.6, 0.9):
        border = border_of(p, top_p)
        above = torch.where(p > border, p, 0).sum(-1)
        further = torch.where(p > (border.view(torch.int32) + 1).view(torch.float32), p, 0).sum(-1)
        assert (above >= top_p).all() and (further < top_p).all()


def test_both_ways_find_the_same_nucleus():
    torch.manual_seed(0)
    for V, spread in ((96, 1), (96, 4), (3000, 2)):
        p = (torch.randn(200, V) * spread).softmax(-1)
        p[::3] = p[::3].round(decimals=2)                       # many ties
        for top_p in (0.5013, 0.9437):          # that no sum of hundredths is
            sets = [p > border_of(p, top_p) for border_of in (nucleus_border, border_by_bits)]
            assert torch.equal(*sets)


def test_inverse_cdf_finds_what_a_scan_finds():
    torch.manual_seed(0)
    p = (torch.randn(64, 5000) * 3).softmax(-1)
    p[:, :700] = 0
    p[:, 4000:] = 0  # whole blocks without mass at both ends
    draws = torch.rand(64)
    exact = torch.searchsorted(
        p.double().cumsum(-1),
        draws[:, None].double() * p.double().sum(-1, keepdim=True),
        right=True,
    )
    assert torch.equal(inverse_cdf(p, draws), exact[:, 0])
    assert (inverse_cdf(p, torch.zeros(64)) == 700).all()
    for high in (1 - 2**-24, 1.0):  # even a draw that rounds to the whole mass
        last = inverse_cdf(p, torch.full((64,), high))
        assert (p.gather(1, last[:, None]) > 0).all()
