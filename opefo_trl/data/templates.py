"""Prompt templates: the words around a problem, put on and taken off, and the text of a conversation."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from opefo_trl.validation import check_choice

# DAPO's data sets have these words around each problem. They ask for a line "Answer:", which the reward
# `math_answer_line` reads.
DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'
TEMPLATES: dict[str, str | None] = {
    "none": None,
    "boxed": "{problem}\n\nReason step by step, and put your final answer within \\boxed{}.",
    "dapo": DAPO_PREFIX + "{problem}" + DAPO_SUFFIX,
}


def chat(problem: str, template: str) -> list[dict[str, str]]:
    """Return a conversation whose only message is the problem in its template."""
    content = (TEMPLATES[template] or "{problem}").replace("{problem}", problem)
    return [{"role": "user", "content": content}]


def with_template(dataset: Dataset, template: str) -> Dataset:
    """Turn plain-text prompts into conversations, with the template's words around each problem."""
    if TEMPLATES[check_choice("prompt_template", template, TEMPLATES)] is None:
        return dataset
    if not isinstance(dataset[0]["prompt"], str):
        raise ValueError(
            f"`prompt_template={template!r}` takes plain-text prompts, and these are conversations. Use "
            "`prompt_template=none`, or name a column with plain text: --prompt_column NAME."
        )
    return dataset.map(lambda row: {"prompt": chat(row["prompt"], template)})


def strip_dapo_template(prompt: Any) -> Any:
    """Return the problem inside DAPO's template, unchanged to the letter; return any other prompt as it is."""
    text = prompt
    if not isinstance(prompt, str) and len(prompt) == 1 and prompt[0].get("role") == "user":
        text = prompt[0].get("content")
    if isinstance(text, str) and text.startswith(DAPO_PREFIX) and text.endswith(DAPO_SUFFIX):
        return text.removeprefix(DAPO_PREFIX).removesuffix(DAPO_SUFFIX)
    return prompt


def problem_text(prompt: Any) -> str:
    """Return the text of a problem, which is the same however it is spaced, and inside DAPO's template or not."""
    return " ".join(text_of(strip_dapo_template(prompt)).split())


def text_of(messages: Any, last_only: bool = False) -> str:
    """Return the text of a prompt or completion: itself, or the contents of its messages (or of the last one)."""
    if isinstance(messages, str):
        return messages
    messages = messages[-1:] if last_only else messages
    return "\n".join(str(message.get("content") or "") for message in messages)
