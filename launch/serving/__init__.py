"""An HTTP server that speaks OpenAI's protocol, in front of a generating session on rank 0."""
