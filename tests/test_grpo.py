"""Advantages and the loss, by hand, and where the gradient goes."""

import pytest
import torch

from grpo import group_advantages, grpo_loss


def test_advantages_by_hand():
    # mean 1, deviations -1 0 1, sample variance (1 + 0 + 1) / 2 = 1
    got = group_advantages(torch.tensor([0.0, 1.0, 2.0]), eps=0.0)
    assert torch.allclose(got, torch.tensor([-1.0, 0.0, 1.0]))
    got = group_advantages(torch.tensor([0.0, 1.0, 2.0]))
    assert torch.allclose(got, torch.tensor([-1.0, 0.0, 1.0]) / 1.0001)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.7, 1e6])
def test_equal_rewards_give_exactly_zero(value):
    # 0.1 * 8 / 8 is not 0.1 in floating point
    assert (group_advantages(torch.full((8,), value)) == 0).all()
    assert (group_advantages(torch.full((1,), value)) == 0).all()


def test_advantages_of_several_groups_at_once():
    rewards = torch.rand(3, 2, 8)
    whole = group_advantages(rewards)
    for i in range(3):
        for j in range(2):
            assert torch.allclose(whole[i, j], group_advantages(rewards[i, j]))


def loss_by_hand(logp, old, ref, advantages, valid, key, beta, clip, normalize, kl_on):
    total = 0.0
    for g in range(len(logp)):
        row, mass = 0.0, 0.0
        for t in range(len(logp[g])):
            if not valid[g][t]:
                continue
            mass += 1 if normalize == "length" else float(key[g][t])
            rho = float(torch.exp(logp[g][t] - old[g][t]))
            gain = min(rho * advantages[g], min(max(rho, 1 - clip), 1 + clip) * advantages[g])
            x = max(-10.0, min(10.0, float(ref[g][t] - logp[g][t]))) if ref is not None else 0.0
            kl = float(torch.exp(torch.tensor(x))) - x - 1
            weight = float(key[g][t])
            row += weight * gain - beta * kl * (weight if kl_on == "selected" else 1.0)
        total += row / mass if mass else 0.0
    return -total / len(logp)


@pytest.mark.parametrize("normalize", ["length", "selected"])
@pytest.mark.parametrize("kl_on", ["selected", "all"])
@pytest.mark.parametrize("with_ref", [True, False])
def test_loss_equals_the_formula(normalize, kl_on, with_ref):
    torch.manual_seed(0)
    logp, old = -torch.rand(4, 6) * 3, -torch.rand(4, 6) * 3            # the clip binds
    ref = -torch.rand(4, 6) * 30 if with_ref else None                  # the clamp binds
    valid = torch.arange(6)[None] < torch.tensor([6, 3, 1, 4])[:, None]
    key = (torch.rand(4, 6) < 0.5) & valid
    key[2] = False                                                      # a row without key tokens
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.5])
    got, _ = grpo_loss(logp, old, ref, advantages, valid, key, beta=0.04, clip=0.2,
                       normalize=normalize, kl_on=kl_on)
    want = loss_by_hand(logp, old, ref, advantages.tolist(), valid, key, 0.04, 0.2, normalize,
                        kl_on)
    assert got.item() == pytest.approx(want, rel=1e-5)


def test_gradient_is_exactly_zero_at_tokens_not_selected():
    torch.manual_seed(1)
    logp = (-torch.rand(4, 7)).requires_grad_()
    valid = torch.arange(7)[None] < torch.tensor([7, 5, 2, 6])[:, None]
    key = (torch.rand(4, 7) < 0.4) & valid
    loss, _ = grpo_loss(logp, logp.detach(), -torch.rand(4, 7), torch.randn(4), valid, key)
    loss.backward()
    assert (logp.grad[~key] == 0).all()
    assert (logp.grad[key] != 0).all()


def test_kl_on_all_tokens_reaches_tokens_not_selected():
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    valid, key = torch.ones(1, 2).bool(), torch.tensor([[True, False]])
    ref = torch.tensor([[-1.5, -1.0]])
    loss, _ = grpo_loss(logp, logp.detach(), ref, torch.zeros(1), valid, key, kl_on="all")
    loss.backward()
    assert logp.grad[0, 1] != 0


def test_a_selected_normaliser_takes_larger_steps():
    logp = torch.zeros(1, 10, requires_grad=True)
    valid, key = torch.ones(1, 10).bool(), torch.arange(10)[None] < 4
    gradients = []
    for normalize in ("length", "selected"):
        loss, _ = grpo_loss(logp, logp.detach(), None, torch.ones(1), valid, key,
                            normalize=normalize)
        gradients.append(torch.autograd.grad(loss, logp)[0][0, 0].item())
    assert gradients[1] == pytest.approx(gradients[0] * 10 / 4)


def test_values_at_padding_are_never_read():
    torch.manual_seed(2)
    valid = torch.tensor([[True, True, False]])
    values = [torch.tensor([[-1.0, -2.0, junk]]) for junk in (0.0, float("nan"))]
    losses = []
    for logp in values:
        logp = logp.clone().requires_grad_()
        old = logp.detach()
        loss, metrics = grpo_loss(logp, old, old - 0.5, torch.ones(1), valid, valid)
        loss.backward()
        assert torch.isfinite(logp.grad[valid]).all() and torch.isfinite(metrics["kl"])
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_soft_weights_scale_tokens():
    logp, valid = torch.zeros(1, 2), torch.ones(1, 2).bool()
    full, _ = grpo_loss(logp, logp, None, torch.ones(1), valid, torch.tensor([[1.0, 1.0]]))
    half, _ = grpo_loss(logp, logp, None, torch.ones(1), valid, torch.tensor([[0.5, 0.5]]))
    assert half.item() == pytest.approx(full.item() / 2)


def test_unknown_choices_are_errors():
    x, valid = torch.zeros(1, 1), torch.ones(1, 1).bool()
    with pytest.raises(ValueError, match="normalize"):
        grpo_loss(x, x, None, torch.ones(1), valid, valid, normalize="batch")
    with pytest.raises(ValueError, match="kl_on"):
        grpo_loss(x, x, None, torch.ones(1), valid, valid, kl_on="key")
    with pytest.raises(ValueError, match="kl_estimator"):
        grpo_loss(x, x, x, torch.ones(1), valid, valid, kl_estimator="k4")
