"""Layers that both stages are composed of."""
