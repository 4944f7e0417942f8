"""Adapters between ftw and trainers, each a module of its own that imports its trainer: name the one you use."""
