"""The parts of `tasks.dbt_core`: models, the dbt process, node task runs, lineage."""
