"""Grading of mathematical answers by math-verify, in worker processes.

from opefo_trl.grading import Grader

with Grader(workers=2, timeout=5) as grader:
    grades = grader.grade(golds, completions)
"""

from opefo_trl.grading.answers import POLICIES, answer_of, bare, boxes_of
from opefo_trl.grading.grader import LONGEST, Grade, Grader, Outcome, cores_of_rank, grader_version

__all__ = [
    "LONGEST",
    "POLICIES",
    "Grade",
    "Grader",
    "Outcome",
    "answer_of",
    "bare",
    "boxes_of",
    "cores_of_rank",
    "grader_version",
]
