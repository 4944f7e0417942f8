"""One pool over several data-parallel processes: what they tell each other, and how they decide together.

    group       collectives, counted, that fail on all processes or on none
    travel      pieces of contributions as bytes
    decide      the decision over the pool of all processes

Called by the selector, where `torch.distributed` is initialised with more than one process.
"""
