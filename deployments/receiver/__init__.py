"""The receiver: what tools outside push becomes a Prefect event, and its runs start exactly once.

    app         the ASGI application: bounded bodies, one answer for each outcome, nothing secret in logs
    source      what a source of events is: it proves the sender and reads the body
    setup       which sources are on (the saved blocks), and what their events start (once triggers)
    airbyte, fivetran, dbt_cloud, census, pagerduty, slack, s3, git, signed       the sources

A hook is acknowledged only once its event is handed over: until then its sender tries again, and nothing is
started twice. `python -m deployments.receiver --help` and `docs/events/` say how it is run.

To add a source: a block in `blocks/receiver.py`, a `Source` for it in a file here, its line in `setup`.
"""
