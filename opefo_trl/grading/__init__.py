"""Grading of mathematical answers by math-verify, in worker processes.

from opefo_trl.grading import Grader

with Grader(workers=2, timeout=5) as grader:
    grades = grader.grade(golds, completions)
"""

from opefo_trl.grading.answers import POLICIES
from opefo_trl.grading.grader import Grade, Grader, Outcome

__all__ = ["POLICIES", "Grade", "Grader", "Outcome"]
