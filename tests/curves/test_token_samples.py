import pytest
import torch
from control_inputs import tokens_of

from opefo_trl.curves.token_samples import extremes, sample_rows, sample_steps


def test_the_first_step_the_last_and_some_between_are_sampled():
    assert sample_steps(300) == {1, 61, 121, 180, 240, 300}
    assert sample_steps(1) == {1}


def test_extremes_are_four_items_from_either_end():
    items = list("abcdefghij")
    assert extremes(items, range(10)) == ["j", "i", "h", "g", "d", "c", "b", "a"]
    assert extremes("abc", [1, 3, 2]) == ["b", "c", "a"]


class Characters:
    def decode(self, ids):
        return "".join(chr(token) for token in ids)


def test_a_sample_has_the_numbers_of_each_token_and_no_padding():
    tokens = tokens_of([[0.1, -0.2, 9.0], [0.3, 0.4, 0.5]], [-1.0, 2.0])
    batch = {
        "prompt_ids": torch.tensor([[0, 81], [81, 82]]), "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[97, 98, 0], [99, 100, 101]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]), "reward": torch.tensor([0.0, 1.0]),
    }  # fmt: skip
    best, worst = sample_rows(7, batch, tokens, Characters())
    assert (best["prompt"], best["tokens"], best["advantage"], best["reward"]) == ("QR", ["c", "d", "e"], 2.0, 1.0)
    assert (worst["prompt"], worst["tokens"], worst["length"], worst["step"]) == ("Q", ["a", "b"], 2, 7)
    assert worst["flow"] == pytest.approx([0.1, -0.2]) and worst["probability"] == [1.0, 1.0]
    assert worst["entropy"] == [0.0, 0.0]
    del batch["reward"]
    assert sample_rows(7, batch, tokens, Characters())[0]["reward"] is None
