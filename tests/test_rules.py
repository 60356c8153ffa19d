"""The rules of the literature: formulas by hand, the seams they stand on, and each one trained."""

import importlib
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, plain_inputs
from test_ktr import arguments, finish, log_of, start, torchrun

import ktr
from attribution import SCORES, WEIGHTS
from grpo import ADVANTAGES, PENALTIES, grpo_loss
from ktr import find_key_tokens
from lab.rules import (
    common, dr_grpo, papo, pepo, pgpo, soft_reward, t_grpo, tor, tw_grpo, vepo, vgpo, vppo)
from options import Options
from policy import predicting_states, sample, score, score_groups
from rewards import EXTRA_REWARDS
from rollout import Group, Rollout
from run.arguments import parse
from run.training import Scorer

RULES = sorted(path for path in (ROOT / "lab/rules").glob("*.py") if path.stem != "common")
RULES_MD = (ROOT / "docs/rules.md").read_text()
VALID = torch.tensor([[True, True, True], [True, True, False]])


def rollout(prompt, seed=0, valid=VALID):
    r = Rollout(prompt, Group(torch.full(valid.shape, 9), valid), seed)
    r.logp, r.loss_mask = torch.zeros(valid.shape), valid
    return r


# ---------------------------------------------------------------------------------- each one trains
def test_every_file_of_rules_is_tried():
    assert {path.stem for path in RULES} >= {"papo", "vppo", "t_grpo", "tw_grpo", "dapo", "pepo"}
    for path in RULES:          # the paper's ablations hold several rules each
        ablation = path.stem in ("masking", "frame_orders", "soft_weights")
        assert len(path.read_text().splitlines()) <= (80 if ablation else 45), path


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_a_rule_trains(path, checkpoint_folder, world, tmp_path, monkeypatch):
    """Two steps, with rewards that differ so that there is something to learn."""
    def rewards(o, processor, group, record):
        return (torch.arange(len(group.ids)) % 2).float(), torch.zeros(len(group.ids))
    monkeypatch.setattr(ktr, "answer_rewards", rewards)
    more = ["--max_steps", 2, "--prompts_per_step", 2, "--max_new_tokens", 8, "--rule", path]
    o = parse(arguments(checkpoint_folder, world, tmp_path, *more))
    assert o != parse(arguments(checkpoint_folder, world, tmp_path, *more[:-2]))
    ktr.main(o)
    log = log_of(tmp_path)
    assert len(log) == 2 and all(math.isfinite(row["loss"]) for row in log)
    cut = o.mask_cut and not any(row["ended"] for row in log)
    assert cut or any(row["grad_norm"] > 0 for row in log)


def test_a_rules_options_hold_unless_given(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text('from attribution import SCORES\nSCORES["mine"] = None\n'
                    'OPTIONS = "--signals mine --ratio 0.3"\n')
    o = parse(["--model", "m", "--data", "d", "--ratio", "0.1", "--rule", str(path)])
    assert o.signals == ["mine"] and o.ratio == 0.1 and "mine" in SCORES
    with pytest.raises(SystemExit, match="error: --rule none.py: no such Python file"):
        parse(["--model", "m", "--data", "d", "--rule", "none.py"])


@pytest.mark.parametrize("text, why", [
    ("def (:", "SyntaxError: .*line 1"),
    ("import attributionn", "ModuleNotFoundError: .*attributionn"),
    ("SCORES['mine'] = None", "NameError: .*SCORES"),
])
def test_a_rules_file_with_a_slip_is_one_line(text, why, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SystemExit, match=f"error: --rule .*mine.py: {why}"):
        parse(["--model", "m", "--data", "d", "--rule", str(tmp_path / "mine.py")])


@pytest.mark.parametrize("option", [
    "weighting", "advantage", "penalty", "extra_reward", "signals"])
def test_a_name_that_nobody_registered(option, checkpoint_folder, world, tmp_path):
    with pytest.raises(SystemExit, match=f"unknown {option.removesuffix('s')} 'mine'; known: "):
        ktr.main(parse(arguments(checkpoint_folder, world, tmp_path, f"--{option}", "mine")))


# ------------------------------------------------------------------------------------------- errors
def ones(r, *_):
    return torch.ones_like(r.logp)


@pytest.mark.parametrize("seam, options, rule, says", [
    (SCORES, "--signals mine", lambda r, o: ones(r)[:, 1:], r"signal mine: .*\(4, \d+\) on cpu"),
    (SCORES, "--signals mine", lambda r, o: ones(r) * math.nan, "signal mine: .*got NaN"),
    (SCORES, "--signals mine", lambda r, o: ones(r).to("meta"), "signal mine: .*on meta"),
    (SCORES, "--signals mine", lambda r, o: r.logp, "signal mine: .*got one with a gradient"),
    (SCORES, "--signals mine", lambda r, o: [0.0], "signal mine: .*got a list"),
    (WEIGHTS, "--weighting mine", lambda r, o: ones(r)[0], r"weighting mine: .*got shape \(\d+,\)"),
    (WEIGHTS, "--weighting mine", lambda r, o: -ones(r), "weighting mine: .*got one below 0"),
    (ADVANTAGES, "--advantage mine", lambda r, o: ones(r)[:2], "advantage mine: .*shape"),
    (ADVANTAGES, "--advantage mine", lambda r, o: r.advantages[:3], "advantage mine: .*shape"),
    (ADVANTAGES, "--advantage mine", lambda r, o: r.advantages / 0 * 0, "advantage mine: .*NaN"),
    (ADVANTAGES, "--advantage mine", lambda r, o: 1.0, "advantage mine: .*got a float"),
    (PENALTIES, "--penalty mine", lambda r, o, m: torch.tensor(1.0), "penalty mine: .*one without"),
    (PENALTIES, "--penalty mine", lambda r, o, m: r.logp, "penalty mine: .*got shape"),
    (SCORES, "--signals mine", lambda r, o: None, "signal mine: .*got a NoneType"),
    (PENALTIES, "--penalty mine", lambda r, o, m: None, "penalty mine: .*got a NoneType"),
    (EXTRA_REWARDS, "--extra_reward mine", lambda rs, o, m, texts: [torch.ones(3)],
     "extra reward mine: .*shape"),
])
def test_an_error_in_a_rule_is_one_line_that_names_it(seam, options, rule, says, checkpoint_folder,
                                                      world, tmp_path):
    seam["mine"] = rule
    more = ["--max_steps", 1, *options.split()]
    with pytest.raises(SystemExit, match=f"^error: {says}") as stop:
        ktr.main(parse(arguments(checkpoint_folder, world, tmp_path, *more)))
    assert "expected a tensor of shape" in str(stop.value) and "\n" not in str(stop.value)


# ------------------------------------------------------------------------------- formulas by hand
def scored_as(prompt, **scores):
    r = rollout(prompt)
    r.scores, r.entropy = {name: torch.tensor(x) for name, x in scores.items()}, torch.zeros(2, 3)
    return r


def test_vppo_by_hand(prompts):
    """Means 2 and 6 of three and two tokens (99 is padding): places 0 and 1; 0.9 and 1.1, whose
    mean is 1. With a second prompt of means 0 and 4: S is 0, 2, 4, 6, mean 3: 0.9 + 0.1 S / 3."""
    r = scored_as(prompts[0], visual=[[1.0, 2.0, 3.0], [4.0, 8.0, 99.0]])
    r.advantages = torch.tensor([1.0, -2.0])
    assert vppo.vppo(r, Options()).tolist() == pytest.approx([0.9, -2.2])
    other = scored_as(prompts[1], visual=[[0.0, 0.0, 0.0], [4.0, 4.0, 99.0]])
    r.batch = other.batch = [other, r]
    want = [0.9 + 0.2 / 3, -2 * (0.9 + 0.6 / 3)]
    assert vppo.vppo(r, Options()).tolist() == pytest.approx(want)
    high = scored_as(prompts[0], visual=[[50.0, 70.0, 10.0], [10.0, 10.0, 0.0]])     # each is 10
    high.advantages = r.advantages
    assert vppo.vppo(high, Options()).tolist() == [1, -2]
    r.logp, r.loss_mask = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]]), VALID
    assert vppo.surprise(r, Options(), None).item() == pytest.approx(0.06 * 10 / 5)


def test_blackened_patches(prompts):
    """Whole patches of 14 x 14 pixels, the same in all frames, about 60% of them."""
    for prompt in (prompts[0], prompts[3]):
        r = rollout(replace(prompt, frames=torch.full_like(prompt.frames, 7)))
        counts = []
        for _ in range(40):
            frames = common.blacken(r, Options()).frames
            assert frames.dtype == torch.uint8 and (frames == frames[:1, :1]).all()
            patches = frames[0, 0].unfold(0, 14, 14).unfold(1, 14, 14).flatten(2).float()
            assert (patches.amin(-1) == patches.amax(-1)).all()
            counts.append((patches[..., 0] == 0).float().mean().item())
        assert abs(sum(counts) / 40 - 0.6) < 0.06 and min(counts) < max(counts)


def test_any_rule_can_name_blackened_patches(tiny, prompts):
    o = parse(["--model", "m", "--data", "d", "--signals", "visual_black", "--rule",
               *(str(ROOT / f"lab/rules/{name}.py") for name in ("pgpo", "black"))])
    r = Rollout(prompts[0], sample(tiny[0], prompts[:1], 2, 6, seeds=[1])[0], 0)
    r.logp, r.entropy = score(tiny[0], r.prompt, r.group)
    find_key_tokens(o, [r], tiny[0])
    assert o.weighting == "pgpo" and r.key_mask.sum(-1).tolist() == pytest.approx(r.group.lengths)
    assert r.scores["visual_black"].max() > 1e-4


def test_papo_by_hand(prompts, monkeypatch):
    """d = log 2: 2 - log 2 - 1; d = -0.5: exp(-0.5) + 0.5 - 1; d = 3: exp(3) - 4, capped."""
    logp, masked = torch.tensor([-2.0, -1.0, -4.0]), torch.tensor([-2 + math.log(2), -1.5, -1.0])
    want = [1 - math.log(2), math.exp(-0.5) - 0.5, 10]
    assert papo.perception(logp, masked).tolist() == pytest.approx(want)
    # d = -1 everywhere: K is exp(-1), and -logp is 1, -logp' is 2
    values = [(torch.full((2, 3), -2.0), None)]
    monkeypatch.setattr(papo, "score_groups", lambda *_: values)
    r = rollout(prompts[0])
    r.logp = torch.full((2, 3), -1.0)
    loss = papo.papo(r, Options(), None)
    assert loss.item() == pytest.approx(-0.02 * math.exp(-1) + 0.05 * (1 + 2))


@pytest.mark.parametrize("both", [False, True])
def test_papos_gradient(tiny, prompts, both):
    """Against finite differences of the formula along one direction in the head's weights: of both
    passes, or of the unmasked one with the other's values as they are."""
    model = tiny[0]
    r = Rollout(prompts[0], sample(model, prompts[:1], 2, 6, seeds=[1])[0], 0)
    r.loss_mask = r.group.completion_mask
    weight, step, values = model.lm_head.weight, 1e-3, []
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    def masked_logp():
        r.generator.manual_seed(5)
        return score(model, common.blacken(r, Options()), r.group)[0].detach()

    kept = masked_logp()
    for shift in (step, -step):
        with torch.no_grad():
            weight += shift * direction
            r.logp = score(model, r.prompt, r.group)[0]
            masked = masked_logp() if both else kept
            weight -= shift * direction
        term = -0.02 * papo.perception(r.logp, masked) - 0.05 * (r.logp + masked)
        values.append(common.row_means(term, r.loss_mask).mean().item())
    r.logp = score(model, r.prompt, r.group)[0]
    r.generator.manual_seed(5)
    (grads,) = torch.autograd.grad(papo.papo(r, Options(), model, gradient=both), weight)
    slope = (values[0] - values[1]) / (2 * step)
    assert (grads * direction).sum().item() == pytest.approx(slope, rel=0.03) and abs(slope) > 1e-5


def test_pgpo_by_hand(prompts):
    """log1p of 0, e - 1, e^4 - 1 is 0, 1, 4: I is 0, 0.25, 1 after min-max; 0.25 / 0.4 = 0.625,
    1 + 2 (1 - 0.4) / 0.6 = 3; the sum 3.625 becomes 3. Equal scores weigh 1."""
    r = scored_as(prompts[0], visual=[[0.0, math.e - 1, math.e ** 4 - 1], [5.0, 5.0, 77.0]])
    got = pgpo.pgpo(r, Options())
    assert got[0].tolist() == pytest.approx([0, 0.625 * 3 / 3.625, 3 * 3 / 3.625])
    assert got[1].tolist() == [1, 1, 0]
    # of three tokens floor(1.2) = 1: the threshold is the second lowest, 0.25; 1 and 3 from there,
    # and below it the floor; of two, floor(0.8) = 0: the lowest, here the highest too
    assert pgpo.pgpo(r, Options(), dev=True).tolist() == [pytest.approx([0.1, 1, 3]), [1, 1, 0]]


def test_tor_by_hand(prompts):
    """30% of ten tokens of two prompts: three of each signal."""
    first = scored_as(prompts[0], cut_entropy=[[9.0, 1.0, 8.0], [0.0, 0.0, 99.0]],
                      visual=[[1.0, 1.0, 7.0], [9.0, 0.0, 99.0]])
    other = scored_as(prompts[1], cut_entropy=[[0.0, 0.0, 0.0], [0.0, 7.0, 99.0]],
                      visual=[[0.0, 0.0, 0.0], [0.0, 5.0, 99.0]])
    first.batch = other.batch = [first, other]
    o = Options(ratio=0.3)
    assert tor.tor(first, o).tolist() == [[1, 0, 1], [0.5, 0, 0]]
    assert tor.tor(other, o).tolist() == [[0, 0, 0], [0, 1, 0]]
    # the first two words have a mass of 0.96: 5/6 and 1/6 of them
    logp = torch.tensor([[0.16, 0.8, 0.02, 0.02]]).log()
    want = -(5 / 6 * math.log(5 / 6) + 1 / 6 * math.log(1 / 6))
    assert tor.entropy_of_top(logp).item() == pytest.approx(want, abs=1e-5)
    assert tor.entropy_of_top(torch.tensor([[0.97, 0.03]]).log()).item() == pytest.approx(0)


def test_vepo_by_hand(prompts, monkeypatch):
    """Predictions over two words. Without noise the first words have 0.5, 0.9, 0.5; with it 0.9,
    0.9, 0.5: only the first token's moves, its j and d are 1, and h is 1, 0, 1."""
    mask = torch.ones(1, 3).bool()
    r = rollout(prompts[0], valid=mask)
    p, q = (torch.tensor([[[x, 1 - x] for x in row]]).log() for row in ([.5, .9, .5], [.9, .9, .5]))
    r.states = lambda prompt=None: (p if prompt is None else q, torch.eye(2))
    r.entropy = torch.special.entr(p.exp()).sum(-1)
    assert vepo.vepo(r, Options())[0].tolist() == pytest.approx([1, 0, 0], abs=1e-5)
    # 1 - (1 - j)^0.7 (1 - d)^0.3 where the second token moves as well, but less
    q = torch.tensor([[[x, 1 - x] for x in (.9, .9, .7)]]).log()
    js = [common.js(p[0], q[0])[i].item() for i in range(3)]
    change = [(torch.special.entr(x.exp()).sum(-1)) for x in (p[0], q[0])]
    d = (change[1] - change[0]).abs().tolist()
    last = 1 - (1 - js[2] / js[0]) ** 0.7 * (1 - d[2] / d[0]) ** 0.3
    assert vepo.vepo(r, Options())[0].tolist() == pytest.approx([1, 0, last], abs=1e-5)
    assert 0.1 < last < 0.9


def test_vepos_noise_has_a_deviation_of_two_in_the_towers_input(prompts):
    r = rollout(prompts[0])
    moved = vepo.noise(r, Options()).pixels() - r.prompt.pixels()
    assert moved.std().item() == pytest.approx(2, rel=0.03) and abs(moved.mean()) < 0.05


def test_vgpo_by_hand(prompts):
    """Of four tokens the last two are late, and of these int(0.4), at least 1, is raised: w is
    0, 0.5, 0.25, 0.75 and 0.75 (1 + 0.3); scaled by 0.975 they are 0, 20/39, 10/39, 1. The second
    row, 1 and 0.5 of two tokens: its second token is the late one, 0.5 (1.3) = 0.65: 1 and 0."""
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    r = rollout(prompts[0], valid=mask)
    r.scores = {"nearness": torch.tensor([[0.2, 0.4, 0.3, 0.5], [0.6, 0.4, 9.0, 9.0]])}
    rows = torch.tensor([[0, 20 / 39, 10 / 39, 1], [1, 0, 0, 0]])
    psi = 1 + rows - torch.tensor([[(69 / 39) / 4], [0.5]])
    alpha = torch.tensor([[1.5], [0.9]])            # sums 69/39 and 1: 1 and 0, less 0.5; from 0.9
    got = vgpo.vgpo(r, Options())
    assert torch.allclose(got, psi.clamp(0.1, 2) * alpha * mask, atol=1e-5)


def test_pepo_by_hand(prompts):
    """v' is 0, 1, 0.5 and h' 1, 0, 0.5: their sum is 1 everywhere, the gate 1."""
    r = scored_as(prompts[0], likeness=[[0.0, 1.8, 0.9], [0.0, 1.8, 9.0]])
    r.entropy = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    assert torch.equal(pepo.pepo(r, Options()), VALID.float())          # at the beginning
    r.progress = 0.5
    w = torch.tensor([0.0, 1.0, 0.5]).softmax(-1) * 3
    # second row: the sums 0 and 2, less 1: the gates are 1 -+ 0.05 tanh(1)
    v = torch.tensor([0.0, 1 + 0.05 * math.tanh(1)]).softmax(-1) * 2
    want = [(0.5 + 0.5 * w).tolist(), [*(0.5 + 0.5 * v).tolist(), 0]]
    assert torch.allclose(pepo.pepo(r, Options()), torch.tensor(want))


@torch.no_grad()
def test_nearness_and_likeness_are_those_of_the_librarys_states(tiny, plain, prompts):
    """Of the states of every layer that transformers gives out for the plain row."""
    r = Rollout(prompts[0], sample(tiny[0], prompts[:1], 2, 6, seeds=[1], ends=[2, 20, 30])[0], 0)
    r.model = tiny[0]
    near, like = vgpo.nearness(r, Options()), pepo.likeness(r, Options())
    assert not tiny[0].model.language_model.layers[0]._forward_pre_hooks
    for g, n in enumerate(r.group.lengths):
        inputs = plain_inputs(r.prompt, r.group.ids[g, :n])
        states = plain(**inputs, output_hidden_states=True).hidden_states
        layers = [h[0].split([len(r.prompt.ids), n]) for h in states]
        assert len(layers) == len(plain.model.language_model.layers) + 1
        visual, own = [x[r.prompt.visual] for x, _ in layers], [x for _, x in layers]
        cosines = [F.cosine_similarity(x[:, None], v[None], dim=-1).mean(1)
                   for x, v in zip(own, visual)]
        assert torch.allclose(like[g, :n], torch.stack(cosines).mean(0), atol=1e-4)
        want = F.cosine_similarity(own[-1], visual[-1].mean(0)[None], dim=-1)
        assert torch.allclose(near[g, :n], want, atol=1e-4) and (near[g, n:] == 0).all()


def test_dr_grpo_by_hand(prompts):
    r = rollout(prompts[0])
    r.rewards, r.advantages = torch.tensor([2.0, 1.0]), torch.zeros(2)
    assert dr_grpo.centred(r, Options()).tolist() == [0.5, -0.5]


def test_tw_grpos_weights_by_hand(prompts):
    r = scored_as(prompts[0], spread=[[1.0, 3.0, 2.0], [1.0, 3.0, 99.0]])
    want = torch.tensor([[1, 1.7, 1.35], [1, 1.7, 0]])
    assert torch.allclose(tw_grpo.tw_grpo(r, Options()), want)


def test_several_right_options_earn_a_part_each(prompts):
    def texts(*answers):
        return [f"<think>x</think><answer>{answer}</answer>" for answer in answers]
    right = "<answer>A, C</answer>"
    for answer, part in (("A,C", 1), ("C, A", 1), ("A", 0.5), ("A, B", 0), ("B", 0), ("", 0)):
        assert soft_reward.part_right(texts(answer)[0], right) == part
    assert soft_reward.part_right("B", "A") == soft_reward.part_right(texts("")[0], "A") == 0
    r = rollout(prompts[0])
    r.accuracy = torch.tensor([1.0, 0.0])
    for solution, kind, want in ((right, "multiple choice", [0.0, 0.5]), (right, "OCR", [0.0, 0.0]),
                                 ("<answer>B</answer>", "multiple choice", [0.0, 0.0])):
        record = {**prompts[0].record, "solution": solution, "problem_type": kind}
        r.prompt = replace(prompts[0], record=record)
        (got,) = soft_reward.in_parts([r], Options(), None, lambda group: texts("A, C", "A"))
        assert got.tolist() == want


@pytest.mark.parametrize("name, published", [
    ("vppo", "--ratio 0.4 --pool response --shift k3 --normalize tokens --clip_high 0.28 --beta 0"),
    ("papo", "--beta 0.01 --kl_on all --clip_high 0.3"),
    ("pgpo", "--shift k3 --normalize tokens --clip_high 0.28 --filter accuracy --beta 0"),
    ("tor", "--ratio 0.3 --normalize tokens --beta 0.01 --kl_on all"),
    ("vepo", "--ratio 0.2 --pool response --normalize selected --beta 0"),
    ("vgpo", "--normalize tokens --clip_high 0.28 --filter accuracy --beta 0"),
    ("pepo", "--beta 0.001 --kl_on all"),
    ("tw_grpo", "--normalize tokens --beta 0 --clip_high 0.28 --max_grad_norm 20"),
    ("dr_grpo", "--normalize constant --beta 0"),
    ("dapo", "--normalize tokens --clip_high 0.28 --filter accuracy --mask_cut --beta 0"),
])
def test_a_rule_trains_under_its_papers_settings(name, published):
    """Its OPTIONS say them: given once more they change nothing. (Formulas: above.)"""
    command = ["--model", "m", "--data", "d", "--rule", str(ROOT / f"lab/rules/{name}.py")]
    given = published.split()
    assert parse([*command, *given]) == parse(command)
    assert (tor.TOP_P, vgpo.TOP) == (0.95, 0.2)         # which the small cases above do not tell


# ------------------------------------------------------------------------------------------- spread
def spread_by_loops(states, head, valid):
    """sum_v (e^d - d - 1) averaged over the group, d = mean log-probability - log-probability
    within +-11."""
    G, T, V = *valid.shape, len(head)
    values = []
    for t in range(T):
        rows = []
        for g in range(G):
            logp = F.linear(states[g, t], head).log_softmax(-1).tolist()
            rows.append(logp if valid[g, t] else [-math.log(V)] * V)
        total = 0.0
        for g in range(G):
            for v in range(V):
                mean = sum(row[v] for row in rows) / G
                d = max(-11.0, min(11.0, mean - rows[g][v]))
                total += math.exp(d) - d - 1
        values.append(total / G)
    return values


@pytest.mark.parametrize("size", [1.0, 25.0])                   # with 25 some differences exceed 11
def test_spread_equals_plain_loops(prompts, size):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 18, 4, generator=generator, dtype=torch.float64)
    head = size * torch.randn(7, 4, generator=generator).double()
    valid = torch.arange(18) < torch.tensor([[18], [5], [17]])  # more than one chunk of 16
    r = Rollout(prompts[0], Group(torch.zeros(3, 18).long(), valid), 0)
    r.states = lambda: (states, head)
    scores, want = tw_grpo.spread(r, Options()), spread_by_loops(states, head, valid)
    assert scores.shape == (3, 18)
    assert all(torch.allclose(row, torch.tensor(want), rtol=1e-3, atol=1e-5) for row in scores)
    same = Rollout(prompts[0], Group(torch.zeros(3, 18).long(), torch.ones_like(valid)), 0)
    same.states = lambda: (states[:1].expand(3, -1, -1), head)
    assert tw_grpo.spread(same, Options()).abs().max() < 1e-4    # all predict the same


def test_spread_is_given_the_states_that_predict(tiny, prompts):
    model = tiny[0]
    (group,) = sample(model, prompts[:1], 4, 12, seeds=[3], ends=[2, 20, 30, 40])
    r = Rollout(prompts[0], group, 0)
    r.logp, r.entropy = (x.detach() for x in score(model, prompts[0], group))
    find_key_tokens(Options(signals=["spread"]), [r], model)
    states, head = predicting_states(model, prompts[0], group)
    want = spread_by_loops(states, head, group.completion_mask)
    assert r.scores["spread"][0].tolist() == pytest.approx(want, rel=1e-3, abs=1e-4)


# -------------------------------------------------------------------------------------------- order
@pytest.mark.parametrize("factor, helped", [
    (1.0, [True, False, True]), (0.8, [True, True, True]), (2.5, [False, False, False])])
def test_the_bonus_goes_to_correct_completions_where_order_helps(prompts, monkeypatch, factor,
                                                                 helped):
    ordered = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0.4, 0], [0.5, 0, 0, 0.1]])  # 0.5, 0.6, 0.15
    blind = torch.tensor([[1.0, 0.0], [0.75, 0.75], [0.15, 0.15]])      # 0.5, 0.75, 0.15 (a tie)
    asked, answers = [], iter(blind)

    def sampled(model, shown, G, limit, *, temperature, top_p, top_k, seeds):
        asked.append((shown, G, limit, temperature, top_p, top_k, seeds))
        return [Group(torch.zeros(G, 1), torch.ones(G, 1)) for _ in shown]

    monkeypatch.setattr(t_grpo, "sample", sampled)
    monkeypatch.setattr(t_grpo, "FACTOR", factor)
    monkeypatch.setattr(t_grpo, "accuracy_reward", lambda text, *_: text)
    o = Options(G=4, max_new_tokens=9, temperature=0.7, top_p=0.9, top_k=5)
    clips, image = prompts[:3], prompts[3]
    still = replace(clips[0], frames=clips[0].frames[:1])     # one frame has no order either
    shown = [clips[0], image, clips[1], still, clips[2]]
    accuracies = [ordered[0], torch.ones(4), ordered[1], torch.ones(4), ordered[2]]
    rollouts = []
    for i, (prompt, accuracy) in enumerate(zip(shown, accuracies)):
        rollouts.append(rollout(prompt, seed=10 * i, valid=torch.ones(4, 2).bool()))
        rollouts[-1].accuracy = accuracy
    got = t_grpo.t_grpo(rollouts, o, None, lambda group: next(answers).tolist())

    correct = torch.tensor([[1.0, 1, 0, 0], [1.0, 1, 1, 0], [1.0, 0, 0, 0]])    # more than 0.1
    want = [torch.zeros(4) for _ in shown]
    for i, clip in enumerate((0, 2, 4)):
        want[clip] = 0.3 * correct[i] * helped[i]
    assert len(got) == 5 and all(torch.allclose(a, b) for a, b in zip(got, want))
    (seen, G, *settings, seeds), = asked        # all clips together, half as many completions
    assert G == 2 and settings == [9, 0.7, 0.9, 5]
    assert seeds == [1, 21, 41]                 # not the random numbers of the ordered group
    for prompt, clip in zip(seen, clips, strict=True):
        assert not torch.equal(prompt.frames, clip.frames) and torch.equal(prompt.ids, clip.ids)
        frames = [sorted(map(str, x.frames.tolist())) for x in (prompt, clip)]
        assert frames[0] == frames[1]           # the same frames


def test_an_image_has_no_order_to_reward(prompts, monkeypatch):
    monkeypatch.setattr(t_grpo, "sample", lambda *_, **__: pytest.fail("nothing to sample"))
    r = rollout(prompts[3])
    r.accuracy = torch.ones(2)
    assert t_grpo.t_grpo([r], Options(), None, None)[0].tolist() == [0, 0]


# ----------------------------------------------------------------------------------------- the loss
LOGP = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -1.0, 0.0]])
OLD = torch.tensor([[-1.2, -2.0, -0.5], [-1.0, -1.0, 0.0]])


def loss_of(advantages, logp=LOGP, old=OLD, ref=None, **options):
    loss, metrics = grpo_loss(logp, old, ref, advantages, VALID, VALID, **options)
    return loss.item(), metrics


def test_advantages_by_token_by_hand():
    """Ratios exp(0.2), 1, 1 and exp(-0.5), 1; the clip cuts the first to 1.2, the fourth to 0.8."""
    A = torch.tensor([[1.0, 2.0, -3.0], [-1.0, 4.0, 99.0]])
    want = -((1.2 + 2 - 3) / 3 + (-0.8 + 4) / 2) / 2
    assert loss_of(A)[0] == pytest.approx(want)
    same = loss_of(torch.tensor([1.0, -2.0])), loss_of(torch.tensor([[1.0] * 3, [-2.0] * 3]))
    assert same[0][0] == same[1][0]


def test_normalisers_by_hand():
    """Objectives 1.2 + 1 + 1 and -0.8 - 1: 1.4 in all, over the group's five tokens or a total."""
    A = torch.tensor([1.0, -1.0])
    assert loss_of(A, normalize="tokens")[0] == pytest.approx(-1.4 / 5)
    assert loss_of(A, normalize="tokens", divisor=7.0)[0] == pytest.approx(-1.4 / 7)
    assert loss_of(A, normalize="constant", divisor=20)[0] == pytest.approx(-1.4 / 20)


def test_a_higher_clip_lets_ratios_rise():
    A = torch.tensor([1.0, -1.0])
    (_, low), (loss, high) = loss_of(A), loss_of(A, clip_high=0.28)
    assert loss == pytest.approx(-((math.exp(0.2) + 2) / 3 - 1.8 / 2) / 2)      # exp(0.2) is 1.221
    assert [x["clipped"].item() for x in (low, high)] == pytest.approx([2 / 5, 1 / 5])


@pytest.mark.parametrize("name, want", [("k1", -0.5), ("k2", 0.125),
                                        ("k3", math.exp(0.5) - 1.5)])
def test_kl_estimators_by_hand(name, want):
    loss, metrics = loss_of(torch.zeros(2), ref=LOGP + 0.5, kl_estimator=name, beta=0.1)
    assert metrics["kl"].item() == pytest.approx(want, abs=1e-6)
    assert loss == pytest.approx(0.1 * want, abs=1e-6)


def with_rewards(prompts, accuracy, form, ended, **options):
    r = rollout(prompts[0])
    r.accuracy, r.format = torch.tensor(accuracy), torch.tensor(form)
    r.extra_reward = torch.zeros(2)
    r.group = Group(r.group.ids, VALID, ended=torch.tensor(ended))
    o = Options(G=2, **options)
    ktr.add_rewards(o, r, VALID)
    return ktr.loss_mask(o, r).sum(-1).tolist()


def test_dropped_groups_and_cut_completions_bear_no_loss(prompts):
    wrong, mixed = ([0.0, 0.0], [1.0, 0.0], [True, True]), ([1.0, 0.0], [0.0, 1.0], [True, False])
    assert with_rewards(prompts, *wrong) == [3, 2]
    assert with_rewards(prompts, *wrong, filter="accuracy") == [0, 0]
    assert with_rewards(prompts, *wrong, filter="reward") == [3, 2]
    assert with_rewards(prompts, *mixed, filter="accuracy") == [3, 2]
    assert with_rewards(prompts, *mixed, filter="reward") == [0, 0]     # both earn 1
    assert with_rewards(prompts, *mixed, mask_cut=True) == [3, 0]


# -------------------------------------------------------------------------------------- whole runs
def every_other(o, processor, group, record):
    """Rewards that differ within every other group, by the record's number."""
    some = (torch.arange(len(group.ids)) % 2).float()
    return (some if record["problem_id"] % 2 else some * 0), some * 0


def test_groups_alike_in_accuracy_are_dropped_on_all_ranks_alike(checkpoint_folder, world,
                                                                 tmp_path, monkeypatch):
    monkeypatch.setattr(ktr, "answer_rewards", every_other)
    more = ["--prompts_per_step", 4, "--max_steps", 2, "--filter", "accuracy"]
    ktr.main(parse(arguments(checkpoint_folder, world, tmp_path, *more)))
    log = log_of(tmp_path)
    assert [row["prompts"] for row in log] == [4, 4] and all(row["flat"] > 0 for row in log)
    assert [row["dropped"] for row in log] == [row["flat"] for row in log]


BRIEF = """from rewards import EXTRA_REWARDS


def brief(rollouts, o, model, texts):
    return [r.group.completion_mask.sum(-1) % 3 * float(r.prompt.record["problem_id"] % 2)
            for r in rollouts]


EXTRA_REWARDS["brief"] = brief
OPTIONS = "--extra_reward brief"
"""


def test_two_ranks_make_the_update_of_one(checkpoint_folder, world, tmp_path):
    """With all that could tell ranks apart: dropped groups, shared divisor, penalty, updates."""
    (tmp_path / "brief.py").write_text(BRIEF)
    more = ["--max_steps", 2, "--filter", "reward", "--normalize", "tokens", "--updates", 2,
            "--rule", ROOT / "lab/rules/papo.py", tmp_path / "brief.py", "--max_new_tokens", 24]
    one, two = tmp_path / "one", tmp_path / "two"
    ktr.main(parse(arguments(checkpoint_folder, world, one, "--prompts_per_step", 2, *more)))
    code, out = finish(start([*torchrun(2), *arguments(checkpoint_folder, world, two, *more)]))
    assert code == 0, out
    for a, b in zip(log_of(one), log_of(two), strict=True):
        for name in ("reward", "length", "loss", "kl", "clipped", "dropped", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name
    assert {row["dropped"] for row in log_of(one)} > {0.5}
    assert max(row["extra_reward"] for row in log_of(one)) > 0.4


def test_several_updates_let_the_clip_bind(checkpoint_folder, world, tmp_path, monkeypatch):
    monkeypatch.setattr(ktr, "answer_rewards", every_other)
    logs = []
    for updates in (1, 3):
        out = tmp_path / str(updates)
        more = ["--prompts_per_step", 4, "--max_steps", 2, "--lr", "5e-2", "--updates", updates]
        ktr.main(parse(arguments(checkpoint_folder, world, out, *more)))
        logs.append(log_of(out))
    once, thrice = logs
    assert [row["clipped"] for row in once] == [0, 0] and thrice[0]["clipped"] > 0
    assert thrice[0]["sampling_gap"] < 1e-5 and once[0]["reward"] == thrice[0]["reward"]


def test_a_batchs_tokens_weigh_alike(tiny, prompts, monkeypatch):
    """--normalize tokens: the gradient is that of the sum over both groups, over their tokens."""
    model = tiny[0]
    o = Options(G=3, prompts_per_step=2, normalize="tokens", beta=0.0, signals=["all"])
    groups = [sample(model, [p], 3, n, seeds=[3], ends=[2, 20, 30])[0]
              for p, n in zip(prompts[:2], (4, 9))]
    rollouts = [Rollout(p, g, 0) for p, g in zip(prompts, groups)]
    for i, r in enumerate(rollouts):
        r.accuracy, r.format = torch.arange(3.0) * (i + 1), torch.zeros(3)
        r.extra_reward = torch.zeros(3)
        ktr.add_rewards(o, r, r.group.completion_mask)
    cpu = torch.device("cpu")
    scorer, divisor = Scorer(model), ktr.loss_divisor(o, rollouts, 1, cpu)
    sizes = [int(g.completion_mask.sum()) for g in groups]
    assert divisor == sum(sizes) / 2 and sizes[0] != sizes[1]
    constant = Options(G=3, max_new_tokens=50, normalize="constant")
    assert ktr.loss_divisor(constant, rollouts, 1, cpu) == 150
    model.zero_grad()
    for r in rollouts:                      # one part each, as where rows are long
        ktr.learn(o, scorer, None, [r], divisor, ktr.Clock(cpu))
    got = model.lm_head.weight.grad.clone()
    model.zero_grad()
    loss = 0.0
    for r, (logp, _) in zip(rollouts, score_groups(model, prompts[:2], groups)):
        loss = loss - (r.advantages[:, None] * logp * r.group.completion_mask).sum() / sum(sizes)
    loss.backward()
    assert torch.allclose(got, model.lm_head.weight.grad, atol=1e-6) and got.abs().max() > 1e-4
    model.zero_grad()


# ------------------------------------------------------------------------------ what is documented
def test_the_rule_in_the_documents_trains(checkpoint_folder, world, tmp_path):
    (text,) = re.findall(r"```python\n(.*?)```", RULES_MD, re.S)
    (tmp_path / "sure.py").write_text(text)
    more = ["--max_steps", 1, "--rule", tmp_path / "sure.py"]
    ktr.main(parse(arguments(checkpoint_folder, world, tmp_path, *more)))
    assert 0.2 <= log_of(tmp_path)[0]["share_sure"] < 0.3


def test_names_in_the_documents_exist():
    for module, name in re.findall(r"`(attribution|grpo|rewards|rollout|ktr)\.(\w+)`", RULES_MD):
        assert hasattr(importlib.import_module(module), name), name
    read = RULES_MD.split("What a rule may read")[1].split("\n\n")[0]
    fields = Rollout.__dataclass_fields__.keys() - {"seed", "metrics"}
    assert all(f"`{name}" in read for name in fields)
    named = set(re.findall(r"(\w+\.py)", RULES_MD))
    assert all(path.name in named for path in RULES)
    assert all((ROOT / path).exists() for path in re.findall(r"--rule (lab/\S+?\.py)", RULES_MD))
