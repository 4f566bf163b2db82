"""Distillation of dense diffusion transformers into MoE and MoB models, and the `d2m` command.

Nothing heavy is imported here; every module pulls in what it needs.
"""
