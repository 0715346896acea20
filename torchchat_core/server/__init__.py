"""The HTTP server: OpenAI's interface over whatever models and executors are installed (extra `server`)."""
