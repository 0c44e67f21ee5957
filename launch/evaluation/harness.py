"""weft's models for lm-evaluation-harness: any of its tasks, in any layout."""

from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from weft.launch.errors import UserError
from weft.launch.evaluation.perplexity import windows
from weft.launch.evaluation.results import Result
from weft.launch.evaluation.scores import Scorer

GENERATED_TOKENS = 256  # where a task does not say


class HarnessModel(LM):  # type: ignore[misc]  # lm-eval carries no types
    """Answers the harness's three kinds of requests from a session."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what the model would have said."""
        pairs = [self.scorer.continuation(*request.args) for request in requests]
        return [(found.total, found.greedy) for found in self.scorer.likelihoods(pairs)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text."""
        totals = []
        for request in requests:
            body = self.scorer.vocabulary.tokenizer.encode(request.args[0], add_special_tokens=False).ids
            prefix = self.scorer.prefix
            pairs = list(windows([*prefix, *body], len(prefix), self.scorer.capacity))
            totals.append(sum(found.total for found in self.scorer.likelihoods(pairs)))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The likeliest text after each context, up to one of the task's ends.

        Raises:
            UserError: a task wants to draw.
        """
        if any(request.args[1].get("do_sample") and request.args[1].get("temperature", 1) for request in requests):
            raise UserError("a task of --harness draws its texts (do_sample), which is not supported; choose another.")
        stops = [_listed(request.args[1].get("until")) for request in requests]
        most = [int(request.args[1].get("max_gen_toks", GENERATED_TOKENS)) for request in requests]
        return self.scorer.greedy([request.args[0] for request in requests], stops, most)


def run_harness(tasks: list[str], folder: Path | None, scorer: Scorer, limit: int | None) -> list[Result]:
    """The harness's results for some of its tasks, or of those that a folder describes.

    Raises:
        UserError: there is no such task.
    """
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(f"--harness {unknown[0]} is no task of lm-evaluation-harness; lm-eval ls tasks lists them.")
    found = simple_evaluate(HarnessModel(scorer), tasks=tasks, task_manager=manager, limit=limit, log_samples=False)
    results = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, form = key.partition(",")
            error = metrics.get(f"{metric}_stderr,{form}")
            if isinstance(value, int | float) and form and not metric.endswith("_stderr"):
                count = found["n-samples"][task]["effective"]
                results.append(Result(task, metric, value, error if isinstance(error, float) else None, count))
    return results


def _listed(until: Any) -> list[str]:
    return [until] if isinstance(until, str) else list(until or [])
