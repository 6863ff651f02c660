"""Compiled models on a device."""
