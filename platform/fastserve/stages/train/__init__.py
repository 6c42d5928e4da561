"""The train stage: fine-tune the source on rows, over the workers of a Ray Train group."""
