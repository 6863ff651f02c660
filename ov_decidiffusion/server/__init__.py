"""The HTTP server: OpenAI's images API."""
