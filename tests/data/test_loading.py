"""Training data from wherever it lies."""

import json

import pytest
from datasets import Dataset, DatasetDict
from shared import EVAL, needs

from opefo_trl.data import bare_problems, clean, hold_out, load_splits, pick_split, whole_batches, with_template
from opefo_trl.data.cleaning import DAPO_AFTER, DAPO_BEFORE, overlapping, problem_of

ROWS = [{"prompt": f"{index}+1=", "answer": str(index + 1)} for index in range(10)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(ROWS).to_csv(tmp_path / "rows.csv")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv", "rows.json"])
def test_files(folder, name):
    splits = load_splits(str(folder / name))
    assert list(splits) == ["train"] and splits["train"]["prompt"] == [row["prompt"] for row in ROWS]


def test_folders(folder, tmp_path):
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])}).save_to_disk(folder / "saved")
    Dataset.from_list(ROWS).save_to_disk(folder / "one")
    (folder / "files").mkdir()
    (folder / "files" / "train.jsonl").write_text((folder / "rows.jsonl").read_text())
    (folder / "files" / "test.jsonl").write_text((folder / "rows.jsonl").read_text())
    assert {name: len(rows) for name, rows in load_splits(str(folder / "saved")).items()} == {"train": 10, "test": 2}
    assert list(load_splits(str(folder / "one"))) == ["train"]
    assert set(load_splits(str(folder / "files"))) == {"train", "test"}


def test_the_playground():
    assert set(load_splits("playground")) == {"train", "test"}


def test_what_is_not_there_or_cannot_be_read(folder):
    (folder / "broken.jsonl").write_text('{"prompt": ')
    (folder / "notes.txt").write_text("hello")
    (folder / "empty").mkdir()
    for name, words in {
        "nowhere.jsonl": "There is no file",
        "./nowhere": "There is no file",
        str(folder / "broken.jsonl"): "cannot be read",
        str(folder / "notes.txt"): "none of .jsonl, .json, .parquet, .csv",
        str(folder / "empty"): "holds no data set",
        "nobody/nothing": "'nobody/nothing' cannot be loaded",
    }.items():
        with pytest.raises((ValueError, OSError), match=words) as caught:
            load_splits(name)
        assert "\n" not in str(caught.value)


def test_columns_get_the_names_that_rewards_look_for():
    data = Dataset.from_list([{"question": "1+1=", "solution": "2", "answer": "two"}])
    bare = bare_problems(data, "question", "solution")
    assert bare[0] == {"prompt": "1+1=", "answer": "2"}
    boxed = with_template(bare, "boxed")[0]["prompt"]
    assert boxed[0]["role"] == "user"
    assert boxed[0]["content"].startswith("1+1=\n") and boxed[0]["content"].endswith("\\boxed{}.")


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "p", "answer": "1"}, "1"),
        ({"question": "p", "answer": "so\n#### 1"}, "so\n#### 1"),  # GSM8K
        ({"Problem": "p", "Answer": "1"}, "1"),
        ({"problem": "p", "solution": "is \\boxed{1}"}, "is \\boxed{1}"),  # MATH
        ({"prompt": "p", "reward_model": {"ground_truth": "1", "style": "x"}}, "1"),  # DAPO
        ({"prompt": "p"}, None),
    ],
)
def test_columns_are_found_without_being_named(row, answer):
    bare = bare_problems(Dataset.from_list([row]))[0]
    assert bare["prompt"] == "p" and bare.get("answer") == answer
    assert {name: bare[name] for name in row} == row  # and stay for rewards that want them


def test_a_field_of_a_column_can_be_named():
    data = Dataset.from_list([{"prompt": "p", "meta": {"gold": {"text": "5"}}}])
    assert bare_problems(data, None, "meta.gold.text")[0]["answer"] == "5"
    with pytest.raises(ValueError, match=r"no column 'meta\.silver'; it has prompt, meta"):
        bare_problems(data, None, "meta.silver")


def test_braces_in_a_problem_are_left_alone():
    problem = r"Find \frac{1}{2} of {x} and {problem}"
    for template in ("boxed", "dapo"):
        chat = with_template(Dataset.from_list([{"prompt": problem}]), template)[0]["prompt"]
        assert problem in chat[0]["content"]


@pytest.mark.parametrize(
    "problem",
    [
        "Solve it.",
        "the answer to the problem.",
        ".problem the to answer",
        'Remember "Answer:".',
        "n\n\n",
        "\n\nR",
        '":.rewsnA"',
        "S",
        " leading and trailing ",
        DAPO_BEFORE,
        DAPO_AFTER,
        DAPO_BEFORE + "x" + DAPO_AFTER,
    ],
)
def test_the_prompt_around_dapos_problems_comes_off_to_the_letter(problem):
    prompt = DAPO_BEFORE + problem + DAPO_AFTER
    assert problem_of(prompt) == problem and problem_of([{"role": "user", "content": prompt}]) == problem
    assert with_template(Dataset.from_list([{"prompt": problem}]), "dapo")[0]["prompt"][0]["content"] == prompt
    two = [{"role": "system", "content": "s"}, {"role": "user", "content": prompt}]
    assert problem_of(two) == two and problem_of(problem[1:]) == problem[1:]


def test_prompts_of_two_kinds_are_refused_where_one_has_to_come_off():
    dapo, other = DAPO_BEFORE + "1+1?" + DAPO_AFTER, "2+2?"
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in (dapo, other)]})
    with pytest.raises(ValueError, match="Some prompts are DAPO's"):
        clean(data, bare=True)
    assert len(clean(data)[0]) == 2


def test_blank_rows_and_holes_in_a_field_are_named():
    for row in ({"prompt": "  "}, {"prompt": [{"role": "user", "content": ""}]}):
        with pytest.raises(ValueError, match="1 of 1 rows have nothing in column 'prompt'"):
            bare_problems(Dataset.from_list([row]))
    rows = [{"prompt": "a", "reward_model": {"ground_truth": "1"}}, {"prompt": "b", "reward_model": None}]
    with pytest.raises(
        ValueError, match=r"1 of 2 rows have nothing in column 'reward_model\.ground_truth', first row 1"
    ):
        bare_problems(Dataset.from_list(rows))


def test_each_problem_once_and_none_with_two_answers():
    texts = ["1+1?", "1 +  1?", "1+1?", "2+2?", "3+3?", "3+3?", "4+4?\n"]
    answers = ["2", "2", "2", "4", "6", "7", "8"]
    chats = [[{"role": "user", "content": DAPO_BEFORE + text + DAPO_AFTER}] for text in texts]
    data = Dataset.from_dict({"prompt": chats, "answer": answers, "n": range(7)})
    rows, left_out = clean(data, bare=True)
    assert rows["prompt"] == ["1+1?", "1 +  1?", "2+2?", "4+4?\n"] and rows["n"] == [0, 1, 3, 6]
    assert str(left_out) == "7 rows, without 2 repetitions, 1 problems with contradictory answers"
    as_they_are, _ = clean(data)
    assert as_they_are["prompt"][0] == chats[0]
    untouched, left_out = clean(data, unique=False)
    assert len(untouched) == 7 and str(left_out) == "7 rows"


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
    rows, left_out = clean(data, benchmarks={"aime24": [LEAK], "amc23": ["Something else, and as long as that"]})
    assert rows["prompt"] == [own, "5?"] and str(left_out) == "4 rows, without 2 that are in aime24"
    chats = data.map(
        lambda row: {"prompt": [{"role": "user", "content": "\n" + row["prompt"]}]}, remove_columns="prompt"
    )
    kept, left_out = clean(chats, benchmarks={"aime24": [LEAK]})
    assert len(kept) == 2 and left_out.leaked == {"aime24": ["\n" + LEAK, "\n" + near]}
    with pytest.raises(ValueError, match="gram=0"):
        overlapping([], [], gram=0)


@needs("bench", "hf_like")
def test_the_shape_of_dapos_data_comes_down_to_its_problems():
    """A copy of its columns and of its hundred repetitions, around 43 other problems."""
    splits = load_splits(str(EVAL / "hf_like" / "BytedTsinghua-SIA__DAPO-Math-17k_SHAPE-FIXTURE"))
    rows, left_out = clean(bare_problems(splits["train"]), bare=True)
    assert len(rows) == 43 and left_out.rows == 4300 and left_out.repeated == 4257
    assert all(isinstance(prompt, str) and "Answer:" not in prompt for prompt in rows["prompt"])
    again = load_splits(str(EVAL / "hf_like" / "open-r1__DAPO-Math-17k-Processed_SHAPE-FIXTURE"))["train"]
    assert sorted(bare_problems(again)["answer"]) == sorted(rows["answer"])


@needs("bench")
def test_benchmarks_are_found_in_themselves_and_hardly_in_one_another():
    texts = {
        name: [json.loads(line)["problem"] for line in (EVAL / "bench" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("aime24", "aime25", "amc23", "math500")
    }
    for name, problems in texts.items():
        assert overlapping(problems, problems) == list(range(len(problems)))
        for other in texts:
            assert other == name or overlapping(problems, texts[other]) == []


def test_columns_that_are_missing_are_named():
    data = Dataset.from_list([{"text": "1+1=", "answer": "2"}])
    with pytest.raises(ValueError, match=r"no column 'prompt'; it has text, answer.*--prompt_column"):
        bare_problems(data)
    with pytest.raises(ValueError, match=r"no column 'gold'.*--answer_column"):
        bare_problems(data, "text", "gold")
    with pytest.raises(ValueError, match="prompt_template='box'"):
        with_template(data, "box")
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": "1+1="}]}])
    with pytest.raises(ValueError, match="these are conversations"):
        with_template(chats, "boxed")
    holes = Dataset.from_list([{"prompt": "a", "answer": 1.0}, {"prompt": "b", "answer": float("nan")}])
    with pytest.raises(ValueError, match=r"1 of 2 rows have nothing in column 'answer', first row 1"):
        bare_problems(holes)


def test_evaluation_takes_the_test_split_or_rows_that_are_not_trained_on():
    rows = Dataset.from_list(ROWS)
    train, test = hold_out(rows, rows.select(range(4)), 3, 0, "x")
    assert len(train) == 10 and len(test) == 3
    train, test = hold_out(rows, None, 3, 0, "x")
    assert len(train) == 7 and len(test) == 3 and not set(train["prompt"]) & set(test["prompt"])
    assert hold_out(rows, None, 3, 0, "x")[1]["prompt"] == test["prompt"]
    assert hold_out(rows, None, 0, 0, "x")[1] is None
    assert len(hold_out(rows, None, None, 0, "x")[1]) == 1  # a tenth
    assert len(hold_out(rows, rows, None, 0, "x")[1]) == 10
    assert [len(whole_batches(rows, size)) for size in (3, 5, 10, 64)] == [9, 10, 10, 10]
    with pytest.raises(ValueError, match="eval_prompts=10"):
        hold_out(rows, None, 10, 0, "x")


def test_splits_that_are_not_there_or_empty():
    splits = DatasetDict({"train": Dataset.from_list(ROWS), "none": Dataset.from_list([])})
    with pytest.raises(ValueError, match="`split='test'`.*'train', 'none'"):
        pick_split(splits, "test", "x")
    with pytest.raises(ValueError, match="empty"):
        pick_split(splits, "none", "x")
