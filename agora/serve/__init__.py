"""The gateway: agora over HTTP, in OpenAI's words where there are any."""
