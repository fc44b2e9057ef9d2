"""The printed list of what is on the stage and how to play with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandbox import catalog

if TYPE_CHECKING:
    from sandbox.server import Sandbox


def guide(sandbox: Sandbox) -> str:
    """What is there, with everything that is needed to use it, as plain text."""
    control = f"{sandbox.url}/_sandbox"
    connections = "\n".join(
        f"    {spec.name:<9} {spec.connection_id}   {spec.stream.table:<22} owner:{spec.owner}"
        for spec in catalog.CONNECTIONS
    )
    syncs = "\n".join(
        f"    {spec.sync_id}  {spec.slug:<26} {spec.table:<29} owner={spec.owner}" for spec in catalog.SYNCS
    )
    sequences = "\n".join(
        f"    {spec.sequence_id:<4} {spec.name:<26} {', then '.join(map(str, spec.sync_ids))}"
        for spec in catalog.SEQUENCES
    )
    census = "\n".join(
        f"    {spec.sync_id}  {spec.label:<26} {spec.table:<29} {spec.operation}"
        for spec in catalog.CENSUS_SYNCS
    )
    fivetran = "\n".join(
        f"    {spec.connection_id:<17} {spec.schema:<25} {spec.service:<14} {spec.stream.table}"
        for spec in catalog.FIVETRAN_CONNECTIONS
    )
    dashboards = "\n".join(
        f"    {spec.dashboard_id}   {spec.name:<18} {spec.product:<9} {spec.table}"
        for spec in catalog.DASHBOARDS
    )
    jobs = "\n".join(
        f"    {spec.job_id}  {spec.name:<16} {'; '.join(spec.steps):<28} {'really runs dbt' * spec.real}"
        for spec in catalog.DBT_JOBS
    )
    webhooks = "\n".join(f"    {name:<15} {sandbox.slack_url(name)}" for name in catalog.WEBHOOKS)
    services = "\n".join(f"    {name:<15} {key}" for name, key in catalog.PAGERDUTY_KEYS.items())
    channels = ", ".join(f"{name} ({id_})" for name, id_ in catalog.CHANNEL_IDS.items())
    return f"""\
The sandbox is at {sandbox.url}  (everything below is invented; the credentials open nothing else)

Airbyte, Public API v1 and Config API
    base URL       {sandbox.airbyte_url}
    Config API     {sandbox.airbyte_config_url}
    client id      {catalog.CLIENT_ID}
    client secret  {catalog.CLIENT_SECRET}
    workspace      {catalog.WORKSPACE_ID}  "{catalog.WORKSPACE_NAME}"
  connections: each really loads its table into the warehouse
{connections}

Hightouch, API v1
    base URL       {sandbox.hightouch_url}
    API key        {catalog.HIGHTOUCH_API_KEY}
  syncs: each reads its table from the warehouse
{syncs}
  sequences
{sequences}

Census, API v1
    base URL       {sandbox.census_url}
    API key        {catalog.CENSUS_API_KEY}
  syncs: each reads its table from the warehouse
{census}

Fivetran, REST API v1
    base URL       {sandbox.fivetran_url}
    API key        {catalog.FIVETRAN_API_KEY}
    API secret     {catalog.FIVETRAN_API_SECRET}
  connections: each really loads its table into the warehouse
{fivetran}

dbt Cloud, Administrative API v2
    domain         {sandbox.dbt_cloud_url}
    account        {catalog.DBT_CLOUD_ACCOUNT_ID}
    API key        {catalog.DBT_CLOUD_TOKEN}
  jobs
{jobs}

Power BI and Tableau, as declared in blocks/dashboards.py
    Power BI       {sandbox.power_bi_url}   tokens: {sandbox.power_bi_login_url}
    tenant         {catalog.POWER_BI_TENANT}
    client id      {catalog.POWER_BI_CLIENT_ID}
    client secret  {catalog.POWER_BI_CLIENT_SECRET}
    workspace      {catalog.POWER_BI_GROUP}
    Tableau        {sandbox.tableau_url}   site: {catalog.TABLEAU_SITE}
    access token   {catalog.TABLEAU_TOKEN_NAME} / {catalog.TABLEAU_TOKEN_SECRET}
  dashboards: each reads its table from the warehouse
{dashboards}

Slack, incoming webhooks
{webhooks}
Slack, Web API (chat.postMessage, chat.update)
    API URL        {sandbox.slack_api_url}
    bot token      {catalog.SLACK_TOKEN}
    channels       {channels}

PagerDuty, Events API v2, by service and integration key
    base URL       {sandbox.pagerduty_url}
{services}

Warehouse (DuckDB, opened only while a job works)
    {sandbox.warehouse.path}

Look
    all at a glance   curl {control}/state
    who asked what    curl '{control}/requests?vendor=airbyte'
    Airbyte's jobs    curl {control}/jobs
    Hightouch's runs  curl {control}/runs
    its sequences     curl {control}/sequences
    Census's runs     curl {control}/census/syncs
    Fivetran's syncs  curl {control}/fivetran/connections
    dbt Cloud's runs  curl {control}/dbt/runs
    dashboards        curl {control}/dashboards
    what was posted   curl {control}/slack/messages
    who was paged     curl {control}/pagerduty/alerts
    as pages          {sandbox.url}/slack and {sandbox.url}/pagerduty

Let the vendors tell of jobs that have ended, to a receiver with blocks called `sandbox`
      curl -X PUT {control}/webhooks -d '{{"receiver":"http://127.0.0.1:4280"}}'
    their secret      {catalog.WEBHOOK_SECRET}
    what became of it curl {control}/webhooks
    a sync by Airbyte's own scheduler
      curl -X POST {control}/connections/weather/jobs

Make trouble
    the weather sync fails, once:
      curl -X PATCH {control}/connections/weather -d '{{"outcome":"fail","times":1}}'
      outcomes: succeed fail cancel incomplete_then_succeed partial stuck zero_rows unknown_word;
      also: duration, queued_seconds, visibility_delay (seconds), status (active, inactive),
      attempts, reason, rejected (rows), tags
    the CRM sync rejects some rows:
      curl -X PATCH {control}/syncs/101 -d '{{"outcome":"warn"}}'
    some records of a Census sync are rejected, some are invalid:
      curl -X PATCH {control}/census/syncs/401 -d '{{"outcome":"partial"}}'
      outcomes: succeed partial fail cancel stuck zero_rows unknown_word; also: paused
    the source of a Fivetran connection has no quota left, once:
      curl -X PATCH {control}/fivetran/connections/gusty_anemometer \\
        -d '{{"outcome":"reschedule","times":1}}'
      outcomes: succeed fail reschedule stuck pause break cancel unknown_word;
      also: paused, setup_state (connected, incomplete, broken), schedule_type (auto, manual)
    a model fails in the next dbt Cloud run:
      curl -X PATCH {control}/dbt/jobs/302 -d '{{"outcome":"fail","node":"fct_flights","times":1}}'
    Airbyte answers 503, three times:
      curl {control}/faults -d '{{"vendor":"airbyte","kind":"status","status":503,"times":3}}'
    a start is accepted, but its reply is lost:
      curl {control}/faults \\
        -d '{{"vendor":"airbyte","method":"POST","path":"/jobs$","kind":"drop_after","times":1}}'
      kinds: status html empty garbage truncated_json null_fields delay drop reset drop_after cut
    nothing listens for 20 seconds:
      curl {control}/outage -d '{{"seconds":20}}'
    tokens live for 3 seconds:
      curl -X PATCH {control}/settings -d '{{"airbyte":{{"token_seconds":3}}}}'
    Airbyte is a server of 2023, with the Config API alone:
      curl -X PATCH {control}/settings -d '{{"airbyte":{{"age":"2023","apis":"config","auth":"basic"}}}}'
    peace again:
      curl -X DELETE {control}/faults
"""
