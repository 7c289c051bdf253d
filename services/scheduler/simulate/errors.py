"""What a simulation refuses, in words for whoever asked for it."""


class SimulateError(Exception):
    """It can not be simulated: a file, an option or a size is wrong; the text says which."""


class SimulationFault(Exception):
    """The simulated cluster broke a rule, say, memory was over-committed: a defect, not input."""
