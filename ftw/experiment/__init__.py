"""The comparison behind `ftw run` and `ftw demo`: data, models, methods, training loops, report.

Called by `ftw.cli`. Nothing in the library depends on it, and `import ftw` does not load it.
"""
