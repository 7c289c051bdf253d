"""What the services say to each other: every command, event, state record and stream chunk.

This package imports msgspec and nothing else of ours, so any service, test or tool can
read the wire without starting a service. One file per direction:

    names       model names as subject tokens, and every subject in one place
    requests    api -> agent: what to generate or embed
    stream      agent -> api: tokens or vectors, and exactly one terminal chunk
    commands    scheduler -> agent, imperative
    events      what happened, past tense
    state       heartbeats and KV records
    asyncapi    the AsyncAPI document generated from all of the above
"""
