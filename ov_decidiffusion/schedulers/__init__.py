"""Schedulers by name: diffusers' own, and the one of DeciDiffusion 2.0."""
