"""The first process of the trainer container: `python -m otj_runtime.launch`.

    PodConfig -> preflight -> accelerate launch -> training ranks
                 watches: generator health, progress, rewards, signals    (each may end the run, with a reason)
                 serves:  GET /progress, GET /healthz, POST /status
    end       -> one failure note -> termination message and exit code

It needs no torch, so it answers within a second and cannot be taken down by what the ranks do. Decisions are pure functions
(`accelerate`, `board`, `watchdog`, `verdict`); `launcher` alone waits, and every wait has a deadline.
"""
