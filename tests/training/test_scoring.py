"""The scoring pass without a trainer: what it asks of a forward, and what it keeps."""

import torch

from opefo_trl.training.eligibility import BatchTransforms
from opefo_trl.training.rebatching import Rebatcher
from opefo_trl.training.scoring import ScoringPass, scoring_arguments

IDS = torch.arange(1, 33).view(4, 8)
MASK = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0], [1] * 8, [0, 1, 1, 1, 1, 1, 0, 0], [1] * 8])
KEEP = 4  # columns of the completion


class Forward:
    """Gives each token its own number as its log-probability."""

    def __init__(self):
        self.sizes = []

    def __call__(self, ids, mask, keep, compute_entropy, **kwargs):
        self.sizes.append(ids.numel())
        logps = ids[:, -keep:].float() * mask[:, -keep:]
        return logps, logps / 2 if compute_entropy else None, None


def run(transforms, policy="policy", keeps=True, **kwargs):
    forward, scoring = Forward(), ScoringPass("sampled", 1.0, False)
    rebatcher = Rebatcher(transforms, None, "dapo", 1, None)

    def score():
        return scoring.run(forward, rebatcher, IDS, MASK, KEEP, batch_size=2, policy=policy, **kwargs)

    if not keeps:
        return forward, *score()[:2], None
    with scoring.keep_scores():
        logps, entropies, _ = score()
        return forward, logps, entropies, scoring.scores_of(logps)


def test_it_is_trls_pass_from_fewer_tokens():
    trimmed, logps, entropies, scores = run(BatchTransforms(True, True, True, True))
    whole, expected, *_ = run(BatchTransforms.none())
    assert torch.equal(logps, expected) and torch.equal(entropies, expected / 2)
    assert sum(trimmed.sizes) < sum(whole.sizes) == IDS.numel()
    assert scores.logps is logps and scores.vocabulary is None
    images, *_ = run(BatchTransforms(True, True, True, True), pixel_values=torch.ones(4, 1))
    assert images.sizes == [IDS.numel()]  # these are scored as TRL scores them


def test_a_reference_model_is_not_asked_for_entropies():
    _, _, entropies, scores = run(BatchTransforms.none(), policy=None)
    assert entropies is None and scores is None
    assert run(BatchTransforms.none(), keeps=False)[2] is None  # nor is the policy, outside of a rollout


def test_the_arguments_are_those_of_trls_own_pass():
    batch = {
        **{"prompt_ids": IDS[:, :4], "prompt_mask": MASK[:, :4]},
        **{"completion_ids": IDS[:, 4:], "completion_mask": MASK[:, 4:], "num_images": [1], "advantages": None},
    }
    (ids, mask, keep), multimodal = scoring_arguments(batch)
    assert torch.equal(ids, IDS) and torch.equal(mask, MASK) and keep == KEEP and multimodal == {"num_images": [1]}
