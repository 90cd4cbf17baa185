"""Split of the rows into those to train on and those to evaluate on."""

from __future__ import annotations

from datasets import Dataset

_DEFAULT_COUNT = 64


def hold_out(
    dataset: Dataset, test: Dataset | None, count: int | None, seed: int, name: str
) -> tuple[Dataset, Dataset | None]:
    """
    Return rows to train on and `count` rows to evaluate on, or None for `count=0`.

    The evaluation rows come from the test split `test`. Without one they are taken off the training rows. By default
    (None) there are 64 of them, but at most a tenth of the training rows if they are taken from those.
    """
    if count == 0:
        return dataset, None
    if test is not None:
        rows = test.shuffle(seed=seed)
        return dataset, rows.select(range(min(_DEFAULT_COUNT if count is None else count, len(rows))))
    if count is None:
        count = min(_DEFAULT_COUNT, max(1, len(dataset) // 10))
    if count >= len(dataset):
        raise ValueError(
            f"`eval_prompts={count}` leaves none of the {len(dataset)} rows of {name!r} to train on, as there is no "
            "test split to take them from. Set it lower, or to 0 for no evaluation."
        )
    split = dataset.train_test_split(test_size=count, seed=seed)
    return split["train"], split["test"]


def whole_batches(dataset: Dataset, prompts: int) -> Dataset:
    """Drop the trailing partial batch, which TRL's mean over batches would overweight. A set smaller than one batch is
    kept."""
    return dataset if len(dataset) <= prompts else dataset.select(range(len(dataset) - len(dataset) % prompts))
