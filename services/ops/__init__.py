"""Running the system on one machine, and looking at it.

nats_server   the embedded server: configuration, credentials
supervisor    child processes: start in order, restart, stop in reverse
stack         which processes make the system, and when it is ready
status        `hotswap status`
trace_view    `hotswap trace`
"""
