"""Tasks of one's own as JSON lines: multiple choice, and answers to generate."""

from pathlib import Path
from typing import Any

from weft.launch.errors import UserError
from weft.launch.evaluation.results import Result, mean
from weft.launch.evaluation.scores import Scorer
from weft.launch.prompts import read_lines

FORM = '{"prompt": "…", "choices": ["…", "…"], "answer": 0} or {"prompt": "…", "answer": "…"}'


def read_task(path: Path) -> list[dict[str, Any]]:
    """The questions of a file, all of one kind.

    Raises:
        UserError: the file cannot be read, or a question is not of the form.
    """
    questions = read_lines(path, FORM)
    for number, question in enumerate(questions, 1):
        if not _is_choice(question) and not _is_open(question):
            raise UserError(f"{path}: object {number} is no question; write {FORM}.")
        if _is_choice(question) != _is_choice(questions[0]):
            raise UserError(
                f"{path}: object {number} is of another kind than the first; put it into a file of its own."
            )
    return questions


def run_task(path: Path, scorer: Scorer, max_tokens: int) -> list[Result]:
    """Accuracy of a file's questions.

    With choices: the one of the highest likelihood is taken, as it is or per byte ("normalized accuracy"). Without: the
    likeliest text, up to the end of its line, must equal an answer but for spaces around it.

    Raises:
        UserError: the file is no task.
    """
    questions = read_task(path)
    if _is_choice(questions[0]):
        return _choose(str(path), questions, scorer)
    texts = scorer.greedy(
        [question["prompt"] for question in questions], [["\n"]] * len(questions), [max_tokens] * len(questions)
    )
    right = [float(text.strip() in _answers(question)) for text, question in zip(texts, questions, strict=True)]
    return [mean(str(path), "exact match", right)]


def _choose(name: str, questions: list[dict[str, Any]], scorer: Scorer) -> list[Result]:
    pairs = [scorer.continuation(question["prompt"], text) for question in questions for text in question["choices"]]
    totals = iter([likelihood.total for likelihood in scorer.likelihoods(pairs)])
    plain, normalized = [], []
    for question in questions:
        found = [next(totals) for _ in question["choices"]]
        per_byte = [total / max(1, len(text.encode())) for total, text in zip(found, question["choices"], strict=True)]
        plain.append(float(found.index(max(found)) == question["answer"]))
        normalized.append(float(per_byte.index(max(per_byte)) == question["answer"]))
    return [mean(name, "accuracy", plain), mean(name, "normalized accuracy", normalized)]


def _is_choice(question: dict[str, Any]) -> bool:
    choices, answer = question.get("choices"), question.get("answer")
    return (
        isinstance(question.get("prompt"), str)
        and isinstance(choices, list)
        and all(isinstance(choice, str) and choice for choice in choices)
        and isinstance(answer, int)
        and 0 <= answer < len(choices)
    )


def _is_open(question: dict[str, Any]) -> bool:
    answers = _answers(question)
    return "choices" not in question and isinstance(question.get("prompt"), str) and bool(answers)


def _answers(question: dict[str, Any]) -> list[str]:
    answer = question.get("answer")
    answers = answer if isinstance(answer, list) else [answer]
    return [text.strip() for text in answers if isinstance(text, str)]
