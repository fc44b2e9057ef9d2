"""What the flows cost, measured: `python -m bench`, or `make bench`.

- Fan-out: `sync_connections` over N sandbox connections of D seconds at concurrency K, and beside it the
  plain way, a polling task per connection mapped on Prefect's default task runner. Each in a fresh process.
- dbt: `dbt_build` with every node as a task run, and beside it plain `dbt build` of the same project.

The Prefect server and the sandbox run as processes of their own, so what is told about a flow's process is
its alone.
"""
