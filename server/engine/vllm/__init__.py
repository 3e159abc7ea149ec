"""The only folder that imports vLLM: process entry, loader plug-in, what each of its processes does first."""
