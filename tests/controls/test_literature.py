"""Every control of the literature: formula (against tests/literature.py), state, options, ten steps of training."""

import json
import math

import literature
import numpy as np
import pytest
import torch
from tiny import build, parameters, tiny_dataset, tiny_model, train
from trl import GRPOConfig, GRPOTrainer

from opefo_trl import OPEFOConfig, OPEFOTrainer
from opefo_trl.controls import CONTROLS, Tokens, make_control
from opefo_trl.controls.statistics import at_random, largest, mean, share_of, spread
from opefo_trl.flow import FlowTotals, minimal_weights, token_flow

OFF_POLICY = {"strict_on_policy": False, "num_iterations": 2}


def some_tokens(seed: int = 0, rows: int = 6, width: int = 9, moved: float = 0.4, vocabulary: int = 7):
    """Tokens drawn from random distributions, and the distributions."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, width, vocabulary, generator=generator, dtype=torch.float64)
    every = logits.log_softmax(-1)
    logps = every[..., 0]
    entropies = -(every.exp() * every).sum(-1)
    mask = (torch.rand(rows, width, generator=generator) < 0.8).long()
    old = (logps + moved * torch.randn(rows, width, generator=generator, dtype=torch.float64)).clamp(max=-0.01)
    advantages = torch.tensor([1.2, -0.7, 0.4, -1.5, 0.0, 0.6], dtype=torch.float64)[:rows].unsqueeze(1)
    logps.requires_grad_(), entropies.requires_grad_()
    flow = token_flow(logps, entropies, advantages)
    return Tokens(logps, entropies, advantages, mask, old, flow, torch.full((rows, 1), 0.25)), every.detach().exp()


def arrays(tokens: Tokens):
    """logps, advantages (one per token), mask, old logps, entropies, in numpy."""
    full = tokens.advantages.expand_as(tokens.logps)
    return [value.detach().numpy() for value in (tokens.logps, full, tokens.mask, tokens.old_logps, tokens.entropies)]


def totals(entropy: float) -> FlowTotals:
    ones = torch.ones(1, 2)
    return FlowTotals.of(torch.tensor([[1.0, -3.0]]), ones, torch.zeros(1, 2)).with_entropy(torch.tensor(entropy))


def close(left, right, tolerance: float = 1e-6) -> None:
    left = left.detach().double().numpy() if isinstance(left, torch.Tensor) else left
    np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)


# ---- means and selections


def test_statistics_are_over_the_tokens_that_train():
    values, mask = torch.tensor([[1.0, 5.0, 9.0, 100.0]]), torch.tensor([[1, 1, 1, 0]])
    assert mean(values, mask) == 5 and spread(values, mask) == pytest.approx(math.sqrt(32 / 3))
    assert mean(values, torch.zeros(1, 4)) == 0
    assert largest(values, mask.bool(), torch.tensor(2.0)).tolist() == [[False, True, True, False]]
    assert largest(values, mask.bool(), torch.tensor(9.0)).tolist() == [[True, True, True, False]]
    assert not largest(values, torch.zeros(1, 4, dtype=torch.bool), torch.tensor(1.0)).any()
    assert share_of(torch.ones(10, 10), 0.057) == 5 and share_of(torch.ones(10, 10), 0.0001) == 1
    torch.manual_seed(0)
    drawn = torch.stack([at_random(mask.bool(), torch.tensor(1.0)) for _ in range(600)]).float().mean(0)
    close(drawn, [[1 / 3, 1 / 3, 1 / 3, 0]], 0.08)


# ---- formulas


def test_clip_cov_draws_among_tokens_of_high_covariance():
    tokens, _ = some_tokens()
    logps, advantages, mask, old, _ = arrays(tokens)
    cov, r = literature.covariances(logps, advantages, mask), np.exp(logps - old)
    clipped = ((r < 0.8) & (advantages < 0)) | ((r > 1.2) & (advantages > 0))
    eligible = (cov > 0.2) & (cov < 2.0) & (mask == 1) & ~clipped
    assert eligible.sum() > 3
    control = make_control("clip_cov", ratio=0.05, low=0.2, high=2.0)
    changed = control.advantages(tokens).detach().numpy() != advantages
    assert changed.sum() == max(1, int(0.05 * mask.sum())) and (eligible | ~changed).all()
    everything = make_control("clip_cov", ratio=1.0, low=0.2, high=2.0).advantages(tokens)
    close(everything, np.where(eligible, 0, advantages))


def test_kl_cov_holds_the_tokens_of_highest_covariance_and_clips_nothing():
    tokens, _ = some_tokens()
    logps, advantages, mask, old, _ = arrays(tokens)
    cov = np.where(mask == 1, literature.covariances(logps, advantages, mask), -np.inf)
    top = np.argsort(cov, axis=None)[-4:]
    expected = np.zeros(cov.size)
    expected[top] = 0.5 * np.abs(logps - old).ravel()[top]
    control = make_control("kl_cov", ratio=4.2 / mask.sum(), coef=0.5)
    close(control.penalty(tokens), expected.reshape(cov.shape))
    assert control.penalty(tokens).requires_grad and control.clip_range(tokens) == (1.0, math.inf)


def test_of_equal_values_no_more_are_taken_than_asked_for():
    same = torch.zeros(4, 4, dtype=torch.float64)
    assert largest(same, torch.ones(4, 4, dtype=torch.bool), torch.tensor(3.0)).sum() == 3


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
@pytest.mark.parametrize("control", ["clip_higher", "clip_low", "dynamic_clip", "ce_gppo", "bapo", "dcpo"])
def test_controls_of_the_clip_range_are_refused_where_there_is_none(control, loss_type, out):
    with pytest.raises(
        ValueError, match=rf"`control='{control}'` lives by the clip range, which `loss_type='{loss_type}'"
    ):
        build(OPEFOTrainer, OPEFOConfig, out, control=control, loss_type=loss_type, **OFF_POLICY)
    build(OPEFOTrainer, OPEFOConfig, out, control="kl_cov", loss_type=loss_type, **OFF_POLICY)


def test_flows_of_single_tokens_and_bounds_of_each_are_refused_where_they_mean_another_thing(out):
    with pytest.raises(ValueError, match=r"which `loss_type='grpo'` weighs by the length of their completion"):
        vocabulary = {"control_kwargs": {"variant": "vocabulary"}, "loss_type": "grpo"}
        build(OPEFOTrainer, OPEFOConfig, out, control="entropy_dynamics", **vocabulary)
    with pytest.raises(ValueError, match="`control='dcpo'` bounds the ratio of each token"):
        build(OPEFOTrainer, OPEFOConfig, out, control="dcpo", importance_sampling_level="sequence", **OFF_POLICY)


def test_numbers_that_yaml_takes_for_text_are_numbers():
    assert make_control("adaptive_entropy", coef_max="5e-3").presets["entropy_coef_max"] == 0.005
    bapo = make_control("bapo", low="6e-1", low_end="7e-1", high="1.2e0", high_end="1.3e0")
    assert bapo.lows == [0.6, 0.65, 0.7] and bapo.highs == [1.2, 1.25, 1.3]


def test_kl_cov_has_no_gradient_strictly_on_policy():
    tokens, _ = some_tokens()
    same = Tokens(tokens.logps, tokens.entropies, tokens.advantages, tokens.mask, tokens.logps.detach(), tokens.flow)
    make_control("kl_cov", ratio=0.5).penalty(same).sum().backward()
    assert (tokens.logps.grad == 0).all()
    noise = 1e-6 * torch.randn(tokens.logps.shape)
    rounded = Tokens(
        tokens.logps, tokens.entropies, tokens.advantages, tokens.mask, tokens.logps.detach() + noise, tokens.flow
    )
    make_control("kl_cov", ratio=0.5).penalty(rounded).sum().backward()
    assert (tokens.logps.grad == 0).all()


def test_the_covariance_kernel_is_a_gaussian_of_standard_deviations():
    tokens, _ = some_tokens()
    logps, advantages, mask, *_ = arrays(tokens)
    cov = literature.covariances(logps, advantages, mask)
    kept = cov[mask == 1]
    z = (cov - kept.mean()) / kept.std()
    close(make_control("covariance_kernel", width=1.5).advantages(tokens), advantages * np.exp(-(z**2) / (2 * 1.5**2)))


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("exponential", 0.8, 1.0), ("linear", 0.8, 1.2), ("asymmetric", 0.9, 1.0)]
)
def test_steer_weighs_by_the_size_of_the_change(kind, low, high):
    tokens, _ = some_tokens()
    logps, advantages, mask, old, entropies = arrays(tokens)
    weights = literature.steer(np.exp(logps), np.exp(old), entropies, advantages, mask, kind, low, high)
    shaped = make_control("steer", map=kind).advantages(tokens).detach().numpy()
    assert np.ptp(weights[mask == 1]) > 0.05
    close((shaped * mask), advantages * weights * mask)


def test_signs_and_weights_of_the_advantage():
    tokens, _ = some_tokens()
    a = tokens.advantages.numpy()
    close(make_control("advantage_sign").advantages(tokens), np.maximum(a, 0))
    close(make_control("advantage_sign", keep="negative").advantages(tokens), np.minimum(a, 0))
    close(make_control("negative_reinforcement").advantages(tokens), np.where(a > 0, 0.1 * a, a))


def test_random_positive_clip_takes_out_positive_tokens_alone():
    tokens, _ = some_tokens()
    _, advantages, mask, *_ = arrays(tokens)
    shaped = make_control("random_positive_clip", ratio=0.1).advantages(tokens).numpy()
    gone = shaped != advantages
    assert gone.sum() == int(0.1 * mask.sum()) and (advantages[gone] > 0).all() and (mask[gone] == 1).all()


def weights_over_a_run(control, entropies):
    tokens, _ = some_tokens()
    seen = []
    for step, entropy in enumerate(entropies):
        control.observe(totals(entropy), step, len(entropies))
        control.observe(totals(entropy), step, len(entropies))  # a second micro-batch changes nothing
        shaped = control.advantages(tokens)
        assert torch.equal(shaped[tokens.advantages < 0], tokens.advantages[tokens.advantages < 0])
        seen.append(float(shaped[0, 0] / tokens.advantages[0, 0]))
    return seen


def test_schedules_of_the_positive_advantage():
    entropies = [0.5, 0.5, math.nan, 0.1, 0.1, 0.1]
    guided = make_control("positive_advantage", target=0.2, step=0.3)
    assert weights_over_a_run(guided, entropies) == pytest.approx([0.3, 0.6, 0.6, 0.3, 0, 0], abs=1e-6)
    stage = weights_over_a_run(make_control("positive_advantage", schedule="stage"), [1.0] * 8)
    assert stage == pytest.approx([0, 0, 0, 0, 0, 0.25, 0.5, 0.75])
    epoch = make_control("positive_advantage", schedule="epoch", num_train_epochs=3.0)
    assert weights_over_a_run(epoch, [1.0] * 6) == pytest.approx([0, 0, 0.5, 0.5, 1, 1])


def test_an_epoch_schedule_without_epochs_is_refused():
    with pytest.raises(ValueError, match=r"`num_train_epochs=1` there is no second one\. Set it to 2 or more"):
        make_control("positive_advantage", schedule="epoch")
    with pytest.raises(ValueError, match=r"counts epochs, and `max_steps=300` ends the run by steps"):
        make_control("positive_advantage", schedule="epoch", num_train_epochs=3.0, max_steps=300)


def test_aer_pays_for_the_entropy_of_hard_questions():
    tokens, _ = some_tokens()
    control = make_control("aer", target="0.5x", step=0.01, ease=0.5)
    for step, entropy in enumerate([1.0, 0.4, 0.4, 0.6]):  # the first is the anchor
        control.observe(totals(entropy), step, 10)
    assert float(control.coef) == pytest.approx(0.01)  # 0, up, up, down
    close(control.penalty(tokens), -0.01 * (1 - 0.25 / 0.5) * tokens.entropies.detach().numpy())
    assert control.penalty(tokens).requires_grad


def test_ce_gppo_keeps_the_gradient_of_clipped_tokens():
    tokens, _ = some_tokens(moved=1.2)
    logps, advantages, _, old, _ = arrays(tokens)
    r = np.exp(logps - old)
    expected = [literature.ce_gppo(x, a) for x, a in zip(r.ravel(), advantages.ravel(), strict=True)]
    control = make_control("ce_gppo")
    # TRL's loss without clipping multiplies by the ratio
    close(control.advantages(tokens).detach().numpy() * r, np.array(expected).reshape(r.shape))
    assert control.clip_range(tokens) == (1.0, math.inf)
    for case in ((r < 0.8) & (advantages < 0), (r > 1.2) & (advantages > 0), (r > 3) & (advantages < 0)):
        assert case.any()


@pytest.mark.parametrize("shift", [-1.5, -0.3, 0.3, 1.5])
def test_bapo_widens_its_bounds_until_positive_samples_weigh_enough(shift):
    tokens, _ = some_tokens(seed=3)
    moved = tokens.advantages + torch.tensor(shift)
    tokens = Tokens(tokens.logps, tokens.entropies, moved, tokens.mask, tokens.old_logps, tokens.flow)
    logps, advantages, mask, old, _ = arrays(tokens)
    low, high = literature.bapo(np.exp(logps - old), advantages, mask)
    control = make_control("bapo")
    bounds = control.clip_range(tokens)
    close([float(bound) for bound in bounds], [1 - low, high - 1])
    assert float(control.metrics()["clip_low"]) == pytest.approx(low)


def test_dcpo_widens_the_bounds_of_unlikely_tokens():
    tokens, _ = some_tokens()
    q = np.exp(arrays(tokens)[3])
    expected = np.array([literature.dcpo(x) for x in q.ravel()])
    low, high = make_control("dcpo").clip_range(tokens)
    close(1 - low, expected[:, 0].reshape(q.shape))
    close(1 + high, expected[:, 1].reshape(q.shape))


@pytest.mark.parametrize("schedule", ["increase_decrease", "decrease_increase_decrease"])
@pytest.mark.parametrize("step", [0, 3, 5, 6, 9])
def test_dynamic_clip_moves_between_its_bounds(schedule, step):
    tokens, _ = some_tokens()
    control = make_control("dynamic_clip", schedule=schedule)
    control.observe(totals(1.0), step, 10)
    p = np.exp(arrays(tokens)[3])
    expected = np.array([literature.dynamic_bounds(x, step / 10, schedule) for x in p.ravel()])
    low, high = control.clip_range(tokens)
    close(low, expected[:, 0].reshape(p.shape))
    close(high, expected[:, 1].reshape(p.shape))


def test_dynamic_clip_oscillates_between_the_floor_and_a_falling_ceiling():
    control, tokens = make_control("dynamic_clip", schedule="oscillating"), some_tokens()[0]
    rising = []
    for step, entropy in enumerate([1.0, 0.95, 0.5, 0.19, 0.3, 0.7]):  # ceiling 1, .87, .73, .6, .47, .33
        control.observe(totals(entropy), step, 6)
        rising.append(float(control.coef))
        low, high = control.clip_range(tokens)
        still = low if rising[-1] else high
        assert (still - 0.2).abs().max() < 1e-6 and max(high.max(), low.max()) > 0.21
    assert rising == [1, 0, 0, 1, 1, 0]


def test_entropy_advantage_adds_at_most_a_share_of_the_advantage():
    tokens, _ = some_tokens()
    _, advantages, _, _, entropies = arrays(tokens)
    close(
        make_control("entropy_advantage", alpha=0.3, kappa=3).advantages(tokens),
        advantages + np.minimum(0.3 * entropies, np.abs(advantages) / 3),
    )


def test_stare_weighs_surprising_tokens_while_its_gate_is_open():
    tokens, _ = some_tokens()
    logps, advantages, mask, *_ = arrays(tokens)
    expected = advantages.copy()
    for side, weight in ((advantages > 0, 1.1), (advantages < 0, 0.9)):
        surprise = np.where(side & (mask == 1), -logps, -np.inf)
        top = np.argsort(surprise, axis=None)[-math.ceil(0.1 * (side & (mask == 1)).sum() - 1e-9) :]
        expected.ravel()[top] *= weight
    control = make_control("stare", variant="both")
    assert torch.equal(control.advantages(tokens), tokens.advantages.expand_as(tokens.logps))
    control.observe(totals(0.2), 0, 10)
    close(control.advantages(tokens), expected)
    control.observe(totals(0.4), 1, 10)
    assert torch.equal(control.advantages(tokens), tokens.advantages.expand_as(tokens.logps))


def test_adaptive_stare_moves_its_weights_within_their_bounds():
    control = make_control("stare", variant="both", adaptive=True)
    for step in range(60):
        control.observe(totals(0.1), step, 100)
    assert (float(control.up), float(control.down)) == pytest.approx((1.5, 0.5))


def test_repo_scales_by_the_log_probability_and_its_zeta_follows_the_entropy():
    tokens, _ = some_tokens()
    logps, advantages, *_ = arrays(tokens)
    control = make_control("repo", zeta=0.04)
    expected = [literature.repo(x, a, 0.04) for x, a in zip(logps.ravel(), advantages.ravel(), strict=True)]
    close(control.advantages(tokens), np.array(expected).reshape(logps.shape))
    zetas = []
    control = make_control("repo", zeta=2e-4)
    for step, entropy in enumerate([1.0, 0.9, 1.1, 1.1, 1.1, 0.9, 0.9]):
        control.observe(totals(entropy), step, 10)
        zetas.append(float(control.coef))
    # halved at the first (not below itself), doubled, halved twice across 0, grown, then back
    assert zetas == pytest.approx([1e-4, 2e-4, 1e-4, -1e-4, -2e-4, -1e-4, 1e-4])
    additive = make_control("repo", variant="additive", beta=0.1).advantages(tokens)
    close(additive, advantages - 0.1 * (logps + arrays(tokens)[4]))


def test_entropy_dynamics_masks_negative_tokens_that_lower_entropy_most():
    tokens, p = some_tokens(vocabulary=5)
    logps, advantages, mask, _, entropies = arrays(tokens)
    score = np.exp(logps) * (logps + entropies)
    kept = score[mask == 1]
    far = (advantages < 0) & (mask == 1) & (score - kept.mean() < -0.8 * kept.std())
    assert far.any()
    close(make_control("entropy_dynamics", mu=0.8).advantages(tokens), np.where(far, 0, advantages))

    p = p.numpy()
    x = (p**2 * (np.log(p) + entropies[..., None])).sum(-1) - score
    known = (mask == 1) & (advantages != 0)
    far = (advantages < 0) & (mask == 1) & (x > 0.5 * x[known].std())
    vocabulary = torch.tensor((p**2 * (np.log(p) + entropies[..., None])).sum(-1))
    flow = token_flow(tokens.logps, tokens.entropies, tokens.advantages, "exact", vocabulary=vocabulary)
    exact = Tokens(tokens.logps, tokens.entropies, tokens.advantages, tokens.mask, tokens.old_logps, flow)
    control = make_control("entropy_dynamics", variant="vocabulary", mu=0.5, share=1.0)
    assert control.estimator == "exact" and far.any()
    close(control.advantages(exact), np.where(far, 0, advantages))
    one = make_control("entropy_dynamics", variant="vocabulary", mu=0.5).advantages(exact)
    assert int((one != tokens.advantages).sum()) == 1


def test_the_minimal_shape_moves_the_flow_as_far_with_the_least_change():
    tokens, _ = some_tokens()
    _, advantages, mask, *_ = arrays(tokens)
    d = tokens.flow.numpy() * mask
    sums = FlowTotals.of(tokens.flow, tokens.mask, tokens.entropies, tokens.advantages)
    total = 0.05 * float(sums.increase + sums.decrease)
    mu = total / sums.leverage
    weights = minimal_weights(tokens.flow, tokens.advantages, mu).numpy()
    expected = literature.minimal((d * (mask == 1)).ravel(), np.where(mask == 1, advantages, 0).ravel(), total)
    assert ((expected > 0) & (expected < 3)).all()  # no bound is met here
    close(weights[mask == 1], expected.reshape(d.shape)[mask == 1], 1e-4)
    assert ((weights - 1) * d * mask).sum() == pytest.approx(total, rel=1e-3)
    assert (weights[4] == 1).all()  # no advantage
    extreme = minimal_weights(tokens.flow, tokens.advantages, 1e6)
    assert extreme.min() == 0 and extreme.max() == 3


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, "sign"),  # the paper's
        ({"flow_target": 0.4}, "minimal"),
        ({"flow_target": 0.4, "flow_shape": "sign"}, "sign"),
        ({"flow_target": 0.4, "sides": "increase"}, "sign"),  # the other knows no groups
        ({"flow_target": 0.4, "flow_schedule": "oscillating"}, "sign"),
        ({"flow_shape": "minimal"}, "minimal"),
    ],
)
def test_the_shape_of_a_run(options, shape):
    assert make_control("opefo", **options).shape == shape


# ---- presets


@pytest.mark.parametrize(
    ("control", "kwargs", "native", "off"),
    [
        ("entropy_bonus", {"coef": 0.02}, {"entropy_coef": 0.02}, False),
        (
            "adaptive_entropy",
            {"target": 3.0, "step": 0.01, "coef": 0.01},
            {"use_adaptive_entropy": True, "entropy_target": 3.0, "entropy_coef_delta": 0.01, "entropy_coef": 0.01},
            False,
        ),
        ("high_entropy_tokens", {"share": 0.3}, {"top_entropy_quantile": 0.3}, False),
        ("clip_higher", {}, {"epsilon": 0.2, "epsilon_high": 0.28}, True),
        ("clip_low", {"low": 0.05}, {"epsilon": 0.05, "epsilon_high": 0.2}, True),
    ],
)
def test_what_trl_has_is_trls_own_bit_for_bit(control, kwargs, native, off, out):
    run = {"max_steps": 4, "gradient_accumulation_steps": 2, **({"num_iterations": 2} if off else {})}
    theirs = train(GRPOTrainer, GRPOConfig, out, **native, **run)
    more = {"strict_on_policy": not off, "micro_batching": "trl"}
    ours = train(OPEFOTrainer, OPEFOConfig, out, control=control, control_kwargs=kwargs, **more, **run)
    for name, value in parameters(theirs).items():
        assert torch.equal(parameters(ours)[name], value), name


def test_a_preset_does_not_overrule_what_somebody_has_set(out):
    with pytest.raises(
        ValueError, match=r"`entropy_coef=0\.5` and `control='entropy_bonus'`, which sets it to 0\.001"
    ):
        build(OPEFOTrainer, OPEFOConfig, out, control="entropy_bonus", entropy_coef=0.5)
    args = build(OPEFOTrainer, OPEFOConfig, out, control="clip_higher", epsilon_high=0.28, **OFF_POLICY).args
    assert (args.epsilon, args.epsilon_high) == (0.2, 0.28)


# ---- state


@pytest.mark.parametrize("name", sorted(CONTROLS))
def test_what_a_control_has_learned_survives_a_restart(name):
    kwargs = {"flow_target": 0.5} if name == "opefo" else {"adaptive": True} if name == "stare" else {}
    entropies = [1.0, 0.7, 0.4, 0.1, 0.05]
    control, restarted = make_control(name, **kwargs), make_control(name, **kwargs)
    for step, entropy in enumerate(entropies):
        control.observe(totals(entropy), step, 10)
    restarted.load_state_dict(json.loads(json.dumps(control.state_dict())))
    for other in (control, restarted):
        other.observe(totals(0.3), 5, 10)
    torch.manual_seed(0)
    tokens, _ = some_tokens()
    shaped = [other.advantages(tokens) for other in (control, restarted) if torch.manual_seed(1)]
    close(shaped[0], shaped[1].detach().numpy())
    assert json.dumps(control.state_dict()) == json.dumps(restarted.state_dict())


# ---- options


WRONG = {
    "steer": [({"map": "cubic"}, "`map='cubic'` .*'exponential'"), ({"w_min": 0}, "`w_min=0` .*above 0")],
    "clip_cov": [({"ratio": 2}, r"`ratio=2` .* in \[0, 1\]"), ({"low": 6}, r"`low=6` .* must be below `high=5\.0`")],
    "kl_cov": [({"coef": "much"}, "`coef='much'` .*must be a number")],
    "covariance_kernel": [({"width": 0}, "`width=0` .*above 0")],
    "positive_advantage": [({"schedule": "cosine"}, "`schedule='cosine'` .*'entropy', 'stage', 'epoch'")],
    "random_positive_clip": [({"ratio": -1}, r"`ratio=-1` .* in \[0, 1\]")],
    "advantage_sign": [({"keep": "both"}, "`keep='both'` .*'positive', 'negative'")],
    "negative_reinforcement": [({"positive_weight": -1}, "`positive_weight=-1`")],
    "entropy_bonus": [({"coef": True}, "`coef=True` .*must be a number")],
    "adaptive_entropy": [({"target": 0}, "`target=0` .* above 0"), ({"coef": 2}, r"`coef=2` .* in \[0, 1\]")],
    "aer": [
        ({"target": "half"}, "`target='half'` is not an entropy.*first step's entropy .{10}[.]$"),
        ({"ease": 0}, "`ease=0` .* above 0"),
    ],
    "clip_higher": [({"low": 2}, "`low=2`")],
    "clip_low": [({"high": -0.1}, r"`high=-0\.1`")],
    "dynamic_clip": [({"schedule": "up"}, "`schedule='up'` .*'oscillating'")],
    "ce_gppo": [({"dual_clip": 1}, "`dual_clip=1` .* above 1"), ({"beta": 1}, "has no option 'beta'. Did you mean")],
    "bapo": [({"low_end": 0.5}, r"`low_end=0\.5` .* in \[0\.6, 1\]")],
    "dcpo": [({"most": float("nan")}, "`most=nan`")],
    "entropy_advantage": [({"kappa": 0}, "`kappa=0`")],
    "high_entropy_tokens": [({"share": 0}, "`share=0` .* above 0")],
    "stare": [({"variant": "o1"}, "`variant='o1'`"), ({"adaptive": 1}, "`adaptive=1` .* True or False")],
    "repo": [({"zeta": 1}, r"`zeta=1` .* in \[0\.0001, 0\.05\]"), ({"variant": "r"}, "`variant='r'`")],
    "entropy_dynamics": [({"mu": -1}, "`mu=-1`"), ({"variant": "v"}, "`variant='v'`")],
    "opefo": [
        ({"flow_schedule": "linear"}, "`flow_schedule='linear'` moves a target: set `flow_target` as well"),
        ({"flow_shape": "minimal", "sides": "increase"}, "`flow_shape='minimal'` knows no groups"),
    ],
    "none": [({"x": 1}, "It takes no options")],
}


@pytest.mark.parametrize("name", sorted(CONTROLS))
def test_a_wrong_option_is_refused_in_plain_words(name):
    for options, message in WRONG[name]:
        with pytest.raises(ValueError, match=message):
            make_control(name, **options)
    with pytest.raises(ValueError, match="has no option 'nonsense'"):
        make_control(name, nonsense=1)


# ---- training


@pytest.mark.parametrize("name", sorted(CONTROLS))
@pytest.mark.filterwarnings("ignore:`control=.*does nothing strictly on-policy")
def test_ten_steps_move_every_parameter_and_stay_finite(name, out):
    on_policy = CONTROLS[name].acts_on_policy
    run = {} if on_policy else OFF_POLICY
    extra = {"train_dataset": tiny_dataset(16)}
    control = train(
        OPEFOTrainer, OPEFOConfig, out, control=name, max_steps=10, gradient_accumulation_steps=2, extra=extra, **run
    )
    begun = tiny_model().state_dict()
    for parameter, value in parameters(control).items():
        assert value.isfinite().all() and not torch.equal(value, begun[parameter]), parameter
    rows = [row for row in control.state.log_history if "loss" in row]
    assert len(rows) == 10
    assert all(math.isfinite(number) for row in rows for number in row.values() if isinstance(number, float))


@pytest.mark.parametrize("name", [name for name in sorted(CONTROLS) if not CONTROLS[name].acts_on_policy])
def test_one_that_needs_several_updates_says_so_strictly_on_policy(name, out):
    said = rf"`control='{name}'` does nothing strictly on-policy.*`strict_on_policy=False`.*`steps_per_generation=4`"
    with pytest.warns(UserWarning, match=said):
        build(OPEFOTrainer, OPEFOConfig, out, control=name)
