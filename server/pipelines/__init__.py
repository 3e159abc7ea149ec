"""What CI jobs and data pipelines do with a served model: structured reviews, batches, extraction."""
