"""The evidence harness: every method on every target with every seed, measured alike, resumable cell by cell.

    PYTHONPATH=benchmarks python -m evidence run DATA [--grid core] [--jobs 2]
    PYTHONPATH=benchmarks python -m evidence report DATA
    PYTHONPATH=benchmarks python -m evidence context [DATA]

docs/evidence.md says what is compared and how to read it.
"""
