"""Plan: what a model will cost on which hardware, before it is bought. Torch-free; each number names its source."""
