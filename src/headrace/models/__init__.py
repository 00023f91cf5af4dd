"""Descriptions of architectures: config rules -> ModelSpec and WeightMap. No tensors."""
