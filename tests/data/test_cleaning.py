"""Repetitions, disputed answers, baked-in prompts and problems of benchmarks come out of training data."""

import pytest
from datasets import Dataset
from material import HUB_COPIES, read_lines

from opefo_trl.data import bare_problems, clean, load_splits
from opefo_trl.data.cleaning import overlapping
from opefo_trl.data.templates import DAPO_PREFIX, DAPO_SUFFIX


def test_each_problem_once_and_none_with_two_answers():
    texts = ["1+1?", "1 +  1?", "1+1?", "2+2?", "3+3?", "3+3?", "4+4?\n"]
    answers = ["2", "2", "2", "4", "6", "7", "8"]
    chats = [[{"role": "user", "content": DAPO_PREFIX + text + DAPO_SUFFIX}] for text in texts]
    data = Dataset.from_dict({"prompt": chats, "answer": answers, "n": range(7)})
    rows, cleaned = clean(data, bare=True)
    assert rows["prompt"] == ["1+1?", "1 +  1?", "2+2?", "4+4?\n"] and rows["n"] == [0, 1, 3, 6]
    assert (cleaned.rows, cleaned.repeated, cleaned.disputed) == (7, 2, 1)
    assert all(count in str(cleaned) for count in ("7 rows", "2 repetitions", "1 problems"))
    in_template, _ = clean(data)
    assert in_template["prompt"][0] == chats[0]
    untouched, cleaned = clean(data, unique=False)
    assert len(untouched) == 7 and str(cleaned) == "7 rows"


def test_prompts_of_two_kinds_are_refused_if_one_has_to_come_off():
    dapo, other = DAPO_PREFIX + "1+1?" + DAPO_SUFFIX, "2+2?"
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in (dapo, other)]})
    with pytest.raises(ValueError, match="DAPO's template.*--prompt_template none"):
        clean(data, bare=True)
    assert len(clean(data)[0]) == 2


LEAK = (
    "Let $a$ and $b$ be positive real numbers such that $a + b = 7$. Find the largest value of $ab^2$ over all pairs."
)


def test_problems_of_a_benchmark_are_left_out():
    near = "Problem 3. " + LEAK.replace("$", "").replace("largest", "greatest")
    phrase = "where $m$ and $n$ are relatively prime positive integers. Find $m + n$."
    own = f"The area of the shaded triangle in the figure can be written as m/n {phrase}"
    asked = f"The probability that the two of them never meet on the long way home is m/n, {phrase}"
    assert overlapping([LEAK, near, own, "5?"], [LEAK, asked, "What is 5?"]) == [0, 1]
    data = Dataset.from_list([{"prompt": text, "answer": "1"} for text in (LEAK, near, own, "5?")])
    rows, cleaned = clean(data, benchmarks={"aime24": [LEAK], "amc23": ["Something else, and as long as that"]})
    assert rows["prompt"] == [own, "5?"] and cleaned.leaked == {"aime24": [LEAK, near], "amc23": []}
    assert "2 problems of aime24" in str(cleaned) and "amc23" not in str(cleaned)
    chats = data.map(
        lambda row: {"prompt": [{"role": "user", "content": "\n" + row["prompt"]}]}, remove_columns="prompt"
    )
    kept, cleaned = clean(chats, benchmarks={"aime24": [LEAK]})
    assert len(kept) == 2 and cleaned.leaked == {"aime24": ["\n" + LEAK, "\n" + near]}


def test_the_shape_of_dapos_data_comes_down_to_its_problems():
    splits = load_splits(str(HUB_COPIES / "BytedTsinghua-SIA__DAPO-Math-17k_SHAPE-FIXTURE"))
    rows, cleaned = clean(bare_problems(splits["train"]), bare=True)
    assert len(rows) == 43 and cleaned.rows == 4300 and cleaned.repeated == 4257
    assert all(isinstance(prompt, str) and "Answer:" not in prompt for prompt in rows["prompt"])
    processed = load_splits(str(HUB_COPIES / "open-r1__DAPO-Math-17k-Processed_SHAPE-FIXTURE"))["train"]
    assert sorted(bare_problems(processed)["answer"]) == sorted(rows["answer"])


def test_benchmarks_are_found_in_themselves_and_not_in_one_another():
    texts = {
        name: [row["problem"] for row in read_lines(f"bench/{name}.jsonl")]
        for name in ("aime24", "aime25", "amc23", "math500")
    }
    for name, problems in texts.items():
        assert overlapping(problems, problems) == list(range(len(problems)))
        for other in texts:
            assert other == name or overlapping(problems, texts[other]) == []
