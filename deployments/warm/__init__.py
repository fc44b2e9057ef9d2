"""A process worker whose runs begin in a process that has imported everything already.

`python -m deployments.warm --pool elt` is `prefect worker start --type process` with one thing changed:
instead of a new interpreter, which needs seconds to import Prefect, each flow run gets a fork of a process
that has done so. Everything else is Prefect's own worker: pools, limits, states, cancellation.

```
worker (Prefect's own)
 ├─ keeper: has imported everything, has one thread, forks            keeper.py
 │   ├─ flow run 1: `python -m prefect.engine`, without the imports
 │   └─ flow run 2
 ├─ stand-in of flow run 1: what the worker takes for the run         stand_in.py
 └─ stand-in of flow run 2
```

The stand-in gives its standard streams, environment and working directory to the fork, passes signals on, and
ends as the fork does. Where no keeper answers it becomes `python -m prefect.engine` itself, as if there were
none of this. A run, its stand-in and its keeper end together: if one is killed, so is the run.

A fork serves one run and ends, so nothing leaks from one run to the next.
"""
