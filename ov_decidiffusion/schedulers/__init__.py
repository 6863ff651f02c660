"""Schedulers by name: diffusers' own, and that of DeciDiffusion 2.0."""
