"""The vocabulary sums of live models, against their own logits: heads that are tied, biased, scaled or softcapped."""

import pytest
import torch
from tiny import SIZES
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    PhiConfig,
    Qwen2Config,
)
from trl.trainer.utils import add_fused_lm_head

from opefo_trl.training.vocabulary_scores import vocabulary_scores

HEADS = {
    "tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "untied": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "bias": PhiConfig(**{**SIZES, "num_key_value_heads": 2}),
    "softcap": Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0),
    "multiplied": CohereConfig(**SIZES, logit_scale=3.0),
    "divided": GraniteConfig(**SIZES, logits_scaling=0.25),
    "gpt2": GPT2Config(vocab_size=23, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1),
}


@pytest.mark.parametrize("estimator", ["exact", "expected"])
@pytest.mark.parametrize("head", HEADS)
def test_scores_of_a_live_model_match_its_own_logits(head, estimator):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HEADS[head]).eval()
    with torch.no_grad():  # a random head is nearly uniform: give it something to say
        model.get_output_embeddings().weight.mul_(20)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    ids, keep, temperature = torch.randint(2, 23, (3, 9)), 4, 0.8
    attention = torch.ones_like(ids)
    with torch.no_grad():
        logits = model(ids, attention_mask=attention).logits[:, -keep - 1 : -1].double() / temperature
    logp = logits.log_softmax(-1)
    p = logp.exp()
    likely = logp - (p * logp).sum(-1, keepdim=True)
    expected = ((p**2 if estimator == "exact" else p * (1 - p) ** 2) * likely).sum(-1)

    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    with torch.no_grad(), vocabulary_scores(model, estimator=estimator, temperature=temperature, keep=keep) as scores:
        outputs = model(ids, attention_mask=attention, labels=ids, fused_lm_head=True)
    (score,) = scores
    assert score.shape == (3, keep) and score.dtype == torch.float32
    torch.testing.assert_close(score.double(), expected, rtol=1e-4, atol=1e-6)
    # and TRL reads the same head: its entropies are those of these logits
    entropies = -(p * logp).sum(-1)
    torch.testing.assert_close(outputs.entropy[:, -keep:].double(), entropies, rtol=1e-4, atol=1e-5)


def test_the_hook_leaves_with_the_block():
    model = AutoModelForCausalLM.from_config(HEADS["tied"])
    with vocabulary_scores(model, estimator="exact", temperature=1.0, keep=2):
        pass
    assert not model.base_model._forward_hooks


def test_head_in_fp32_scores_a_bf16_model_more_finely():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HEADS["untied"]).to(torch.bfloat16).eval()
    ids, scores = torch.randint(2, 23, (2, 9)), {}
    add_fused_lm_head(model)
    for fp32 in (False, True):
        with (
            torch.no_grad(),
            vocabulary_scores(model, estimator="exact", temperature=1.0, keep=4, head_in_fp32=fp32) as found,
        ):
            model(ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
        scores[fp32] = found[0]
    assert scores[True].isfinite().all() and not torch.equal(scores[True], scores[False])
