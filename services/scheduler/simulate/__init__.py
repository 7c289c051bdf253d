"""Traffic of a day against the real scheduler in seconds: `decide`, driven by a cost model.

    workload.py  presets.py     which requests come when, for which models
    traces.py  tail.py          public traces made into files that workload.py reads
    cost.py                     what prefills, decode rounds and swaps take
    compute.py  engine.py       one GPU's engine as a fluid: prompts, rounds, rows
    memory.py  gpu.py           its memory, and its agent
    run.py                      the clock: arrivals, agents and `decide`, until all has ended
    policies.py                 policies to run side by side
    report.py  plots.py         shares, percentiles, bytes; tables, JSON, pictures
    plan.py                     how many GPUs are needed
    command.py                  `hotswap simulate`
    traces_command.py           `hotswap traffic`

The scheduler is not modelled: the very function that the live service calls makes every decision.
The same workload, policy and seed give the same figures to the last digit.
"""
