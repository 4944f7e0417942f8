"""Thin adapters between ftw and trainers. None is built yet; a plain loop needs none (see the README)."""
