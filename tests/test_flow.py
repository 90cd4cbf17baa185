import numpy as np
import oracle
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny import tiny_model

from opefo_trl.flow import (
    ESTIMATORS,
    VOCABULARY_ESTIMATORS,
    FlowTotals,
    balance,
    flow_weights,
    token_flow,
    vocabulary_score,
    vocabulary_sum,
)

ROWS, LENGTH, VOCABULARY = 6, 11, 37


def random_batch(seed: int = 0, temperature: float = 1.0):
    """Logits, sampled tokens, advantages and a mask, as numpy float64."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(ROWS, LENGTH, VOCABULARY)) * rng.choice([0.3, 1.0, 4.0], size=(ROWS, LENGTH, 1))
    p = np.apply_along_axis(oracle.softmax, -1, logits / temperature)
    tokens = np.array([[rng.choice(VOCABULARY, p=p[b, t]) for t in range(LENGTH)] for b in range(ROWS)])
    advantages = rng.normal(size=ROWS)
    mask = (np.arange(LENGTH) < rng.integers(1, LENGTH + 1, size=(ROWS, 1))).astype(float)
    return logits, p, tokens, advantages, mask


def as_tensors(p, tokens, advantages, mask):
    logps = np.log(np.take_along_axis(p, tokens[..., None], -1)[..., 0])
    entropies = np.apply_along_axis(oracle.entropy, -1, p)
    return [torch.tensor(x, dtype=torch.float32) for x in (logps, entropies, advantages, mask)]


def flow_of(logits, tensors, estimator, temperature=1.0):
    logps, entropies, advantages, mask = tensors
    vocabulary = None
    if estimator in VOCABULARY_ESTIMATORS:  # the identity is an LM head whose hidden states are the logits
        hidden, weight = torch.tensor(logits, dtype=torch.float32), torch.eye(VOCABULARY)
        vocabulary = vocabulary_score(hidden, weight, estimator=estimator, temperature=temperature)
    return token_flow(logps, entropies, advantages, estimator, mask=mask, vocabulary=vocabulary)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_flow_lambda_and_weights_match_the_numpy_oracle(estimator, temperature):
    for seed in range(3):
        logits, p, tokens, advantages, mask = random_batch(seed, temperature)
        tensors = as_tensors(p, tokens, advantages, mask)
        flow = flow_of(logits, tensors, estimator, temperature)
        expected = oracle.flows(p, tokens, advantages, mask, estimator)
        kept = mask.astype(bool)
        np.testing.assert_allclose(flow.numpy()[kept], expected[kept], atol=1e-6, rtol=1e-6)

        totals = FlowTotals.of(flow, tensors[3], tensors[1])
        lam = oracle.lambda_star(expected[kept])
        assert balance(totals).item() == pytest.approx(lam, abs=1e-6)
        np.testing.assert_allclose(
            flow_weights(flow, balance(totals)).numpy()[kept], oracle.weights(expected, lam)[kept], atol=1e-6
        )


def test_exact_predicts_the_true_entropy_change_of_a_softmax_step():
    rng, step, errors = np.random.default_rng(0), 1e-4, []
    for _ in range(1000):
        logits = rng.normal(size=rng.integers(3, 60)) * rng.choice([0.5, 1.0, 2.0, 4.0])
        p = oracle.softmax(logits)
        token, advantage = rng.choice(len(p), p=p), rng.normal()
        one_hot = np.eye(len(p))[token]
        after = oracle.softmax(logits + step * advantage * (one_hot - p))  # ascent on A log p[token]
        true = (oracle.entropy(after) - oracle.entropy(p)) / step
        vocabulary = vocabulary_score(torch.tensor(logits)[None], torch.eye(len(p), dtype=torch.float64))
        predicted = token_flow(
            torch.tensor([[np.log(p[token])]]),
            torch.tensor([[oracle.entropy(p)]]),
            torch.tensor([advantage]),
            "exact",
            vocabulary=vocabulary[None],
        ).item()
        # 1 % of the change, or, where a state hardly moves, 1e-6 nats per unit step
        errors.append(abs(predicted - true) - max(0.01 * abs(true), 1e-6))
    assert max(errors) < 0


@pytest.mark.parametrize("estimator", VOCABULARY_ESTIMATORS)
def test_vocabulary_score_is_the_same_in_any_chunking(estimator):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(3, 5, 8), torch.randn(VOCABULARY, 8), torch.randn(VOCABULARY)
    head = {"bias": bias, "estimator": estimator, "temperature": 0.7, "logit_scale": 0.5, "softcap": 3.0}
    whole = vocabulary_score(hidden, weight, **head)
    tiny = vocabulary_score(hidden, weight, **head, budget=1)  # one position at a time
    torch.testing.assert_close(whole, tiny, rtol=1e-6, atol=1e-7)


def test_wrong_estimators_and_sides_are_refused():
    zeros = torch.zeros(2, 3)
    for estimator in VOCABULARY_ESTIMATORS:
        with pytest.raises(ValueError, match=f"'{estimator}'.*`vocabulary=.*'sampled'"):
            token_flow(zeros, zeros, torch.ones(2), estimator)
    with pytest.raises(ValueError, match="'smapled'.*'sampled'"):
        token_flow(zeros, zeros, torch.ones(2), "smapled")
    with pytest.raises(ValueError, match="'steer'.*expected and exact"):
        vocabulary_score(zeros, torch.eye(3), estimator="steer")
    with pytest.raises(ValueError, match="sides='all'"):
        flow_weights(zeros, 0.1, "all")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_extreme_tokens_keep_everything_finite(estimator):
    # sure tokens, impossible tokens, entropy 0, and a row that is masked whole
    logps = torch.tensor([[0.0, -1e4, -1e-8, -1.0], [-1e4, 0.0, -50.0, -2.0]])
    entropies = torch.tensor([[0.0, 0.0, 1e-7, 1.0], [11.9, 0.0, 1e-3, 3.0]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    flow = token_flow(
        logps, entropies, torch.tensor([2.0, -1.0]), estimator, mask=mask, vocabulary=torch.full((2, 4), 0.1)
    )
    assert flow.isfinite().all() and flow.dtype == torch.float32
    for chosen in (mask, torch.zeros_like(mask)):
        totals = FlowTotals.of(flow, chosen, entropies)
        assert totals.sums.isfinite().all() and totals.unknown == 0
        assert flow_weights(flow, balance(totals)).isfinite().all()


def test_tokens_that_are_not_finite_keep_weight_one_and_are_counted():
    logps = torch.tensor([[-1.0, torch.nan, -torch.inf, -2.0]])
    entropies = torch.tensor([[0.5, 0.5, 0.5, torch.nan]])
    flow = token_flow(logps, entropies, torch.tensor([1.0]))
    totals = FlowTotals.of(flow, torch.ones(1, 4), entropies)
    assert totals.sums.isfinite().all()
    assert totals.unknown == 3 and totals.tokens == 1 and totals.entropy == 0.5
    weights = flow_weights(flow, 0.5)
    assert weights[0, 0] == 1.5  # the one known token: unlikely and rewarded, it raises entropy
    assert weights[0, 1:].tolist() == [1, 1, 1]
    covariance = token_flow(logps, entropies, torch.tensor([1.0]), "covariance")
    assert covariance[0, 0].isfinite()  # the mean is taken over the finite tokens


@pytest.mark.parametrize("estimator", VOCABULARY_ESTIMATORS)
def test_vocabulary_sums_are_fp32_under_autocast(estimator):
    logps = torch.randn(3, 5, 50, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    likely = logps - (logps.exp() * logps).sum(-1, keepdim=True)
    expected = vocabulary_sum(logps.exp(), likely, estimator)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(vocabulary_sum(logps.exp(), likely, estimator), expected, atol=0, rtol=0)


def test_flows_are_fp32_and_detached():
    logps = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    flow = token_flow(-logps.abs(), logps.abs(), torch.ones(2, dtype=torch.bfloat16))
    totals = FlowTotals.of(flow, torch.ones(2, 3), logps.abs())
    assert flow.dtype == totals.sums.dtype == torch.float32
    assert not flow.requires_grad and not totals.sums.requires_grad


flows = hnp.arrays(
    np.float32, (3, 4), elements=st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
)


@settings(max_examples=200)
@given(flows)
@example(np.float32([[1, 2]]))
@example(np.float32([[-1, -2]]))
def test_balanced_flow_is_zero_and_weights_are_positive(flow):
    flow = torch.tensor(flow)
    ones = torch.ones_like(flow)
    totals = FlowTotals.of(flow, ones, ones)
    lam = balance(totals)
    weights = flow_weights(flow, lam)
    assert -1 < lam < 1 and (weights > 0).all()
    assert (weights[flow == 0] == 1).all()
    if totals.increase > 0 and totals.decrease > 0:
        balanced = (weights.double() * flow).sum().item()
        assert abs(balanced) <= 1e-5 * flow.double().abs().sum().item()
    else:
        assert lam == 0


@settings(max_examples=100)
@given(flows, flows)
def test_totals_add_up_like_their_tokens(left, right):
    left, right = torch.tensor(left), torch.tensor(right)
    ones = torch.ones_like(left)
    apart = FlowTotals.of(left, ones, left.abs()) + FlowTotals.of(right, ones, right.abs())
    both = torch.cat([left, right])
    together = FlowTotals.of(both, torch.ones_like(both), both.abs())
    torch.testing.assert_close(apart.sums, together.sums, rtol=1e-5, atol=1e-4)
    assert apart.net == apart.increase - apart.decrease


def test_the_entropy_of_totals_is_a_mean_and_can_be_replaced():
    ones = torch.ones(2, 3)
    assert FlowTotals.of(ones, 0 * ones, ones).entropy.isnan()  # of no tokens
    totals = FlowTotals.of(torch.tensor([[2.0, -1.0]]), torch.ones(1, 2), torch.tensor([[0.2, 0.4]]))
    other = totals.with_entropy(torch.tensor(1.5))
    assert other.entropy == 1.5 and other.increase == totals.increase and other.tokens == totals.tokens
    assert totals.entropy.item() == pytest.approx(0.3)  # = (0.2 + 0.4) / 2
    assert totals.with_entropy(torch.tensor(torch.nan)).entropy.isnan()


def test_sides_rescale_one_group_only():
    flow = torch.tensor([[2.0, -3.0, 0.0]])
    assert flow_weights(flow, 0.25).tolist() == [[1.25, 0.75, 1.0]]
    assert flow_weights(flow, 0.25, "increase").tolist() == [[1.25, 1.0, 1.0]]
    assert flow_weights(flow, 0.25, "decrease").tolist() == [[1.0, 0.75, 1.0]]


# ---- prediction


def next_token_logps(model, ids):
    return model(ids).logits[:, :-1].log_softmax(-1)


@pytest.mark.slow
def test_the_sign_of_a_large_predicted_flow_is_that_of_a_real_optimizer_step():
    signs = {"sampled": [], "steer": [], "exact": []}
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        model = tiny_model(seed % 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
        torch.manual_seed(seed)
        ids = model.generate(torch.randint(2, 23, (16, 3)), do_sample=True, min_new_tokens=12, max_new_tokens=12)
        tokens, kept = ids[:, 1:], torch.zeros_like(ids[:, 1:])
        kept[:, 2:] = 1

        logp = next_token_logps(model, ids)
        logps = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        entropies = -(logp.exp() * logp).sum(-1).detach()
        # Rewards that favour what is likely already, or what is not: advantages that carry a large net flow
        confidence = (logps.detach() * kept).sum(-1)
        advantages = (confidence - confidence.mean()) / confidence.std() * (1 if seed % 2 else -1)
        advantages = advantages + 0.5 * torch.randn(16, generator=generator)
        vocabulary = vocabulary_score(model.model(ids).last_hidden_state[:, :-1], model.lm_head.weight)

        (-(advantages.unsqueeze(1) * logps * kept).sum() / kept.sum()).backward()
        optimizer.step()
        with torch.no_grad():
            after = next_token_logps(model, ids)
        change = ((-(after.exp() * after).sum(-1) - entropies) * kept).sum()
        for estimator, same in signs.items():
            flow = token_flow(logps, entropies, advantages, estimator, mask=kept, vocabulary=vocabulary)
            totals = FlowTotals.of(flow, kept, entropies)
            if totals.net.abs() > 0.25 * (totals.increase + totals.decrease):
                same.append(bool(totals.net.sign() == change.sign()))
    for estimator, same in signs.items():
        assert len(same) >= 10 and sum(same) >= 0.9 * len(same), estimator
