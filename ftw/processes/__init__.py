"""One pool over several data-parallel processes: what they tell each other, and how they decide together.

    setting     how a selector stands among the processes: alone, deciding alone, or together
    group       collectives, counted, that fail on all processes or on none
    travel      pieces of contributions as bytes
    spread      who holds what of the parameters: replicas of the model on each process
    sharding    the same where the model is sharded (FSDP2)
    decide      the decision over the pool of all processes

Called by the selector, where `torch.distributed` is initialised with more than one process.
"""
