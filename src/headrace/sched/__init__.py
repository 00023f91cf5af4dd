"""The scheduler and the paged cache: which tokens are computed next, and where. Standard library only."""
