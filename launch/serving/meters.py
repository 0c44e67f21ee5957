"""What the server tells Prometheus of itself."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from weft.model.generation.request import Request

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Meters:
    """Counts since the start of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.responses = Counter("weft_responses", "HTTP responses", ["path", "status"], registry=registry)
        self.refused = Counter("weft_refused", "requests refused because too many wait", registry=registry)
        self.prompt_tokens = Counter("weft_prompt_tokens", "tokens of prompts", registry=registry)
        self.generated_tokens = Counter("weft_generated_tokens", "tokens generated", registry=registry)
        self.texts = Counter("weft_texts", "texts by why they ended", ["finish"], registry=registry)
        self.active = Gauge("weft_active_texts", "texts in slots", registry=registry)
        self.waiting = Gauge("weft_waiting_texts", "texts that wait for a slot", registry=registry)
        self.first_token = Histogram(
            "weft_first_token_seconds", "from the request to its first token", buckets=_SECONDS, registry=registry
        )

    def count(self, request: Request) -> None:
        """Count a text that has ended, or whose client has gone."""
        self.prompt_tokens.inc(len(request.tokens))
        self.generated_tokens.inc(len(request.generated))
        self.texts.labels(request.finish or "cancelled").inc()
