"""The serve stage: a revision as a Ray Serve application around vLLM's own OpenAI server."""
