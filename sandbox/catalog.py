"""What is on the stage: the workspace, the connections, the syncs, the channels, and their credentials.

Everything else in the sandbox reads these constants, so that the vendors, the warehouse and the dbt project
agree on names and ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from uuid import NAMESPACE_URL, uuid5

WORKSPACE_ID = "5a3d0000-2013-4a00-8000-00000000aaaa"
WORKSPACE_NAME = "New York flights"
SOURCE_ID = "50ce0000-2013-4a00-8000-000000000001"
DESTINATION_ID = "de570000-2013-4a00-8000-000000000001"

CLIENT_ID = "sandbox-client"
CLIENT_SECRET = "sandbox-secret"  # noqa: S105 - the whole point of a sandbox is a published password
BASIC_USER = "airbyte"
BASIC_PASSWORD = "password"  # noqa: S105 - Airbyte's own documented default

HIGHTOUCH_API_KEY = "sandbox-hightouch-key"
HIGHTOUCH_WORKSPACE_ID = 2013

DBT_CLOUD_TOKEN = "dbtc_sandbox-service-token"  # noqa: S105 - published, as the others
DBT_CLOUD_ACCOUNT_ID = 2013
DBT_CLOUD_PROJECT_ID = 3001
DBT_CLOUD_ENVIRONMENT_ID = 3101

FIVETRAN_API_KEY = "sandbox-fivetran-key"
FIVETRAN_API_SECRET = "sandbox-fivetran-secret"  # noqa: S105 - published, as all of the sandbox's
FIVETRAN_GROUP_ID = "nimble_harbour"
FIVETRAN_USER_ID = "patient_ferryman"

POWER_BI_TENANT = "7e4a4700-2013-4a00-8000-00000000aaaa"
POWER_BI_CLIENT_ID = "c11e4700-2013-4a00-8000-00000000aaaa"
POWER_BI_CLIENT_SECRET = "sandbox-power-bi-secret"  # noqa: S105 - published, as all of the sandbox's are
POWER_BI_GROUP = "96049500-2013-4a00-8000-00000000aaaa"
TABLEAU_TOKEN_NAME = "sandbox"  # noqa: S105
TABLEAU_TOKEN_SECRET = "sandbox-tableau-secret"  # noqa: S105
TABLEAU_SITE = "flights"
TABLEAU_SITE_ID = "517e0000-2013-4a00-8000-00000000aaaa"

WEBHOOK_SECRET = "sandbox-webhook-secret"  # noqa: S105 - published, as all of the sandbox's are

CENSUS_API_KEY = "sandbox-census-key"
CENSUS_WORKSPACE_ID = 3167

# Times of creation are fixed, so that two runs of the sandbox look alike.
CREATED_AT = 1_735_689_600  # 2025-01-01T00:00:00Z


@dataclass(frozen=True, slots=True)
class Stream:
    """One source table: where its CSV is, where it lands, and its columns with their DuckDB types."""

    name: str
    schema: str
    file: str
    primary_key: tuple[str, ...]
    columns: dict[str, str]

    @property
    def table(self) -> str:
        """The landed table as ``schema.table``."""
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True, slots=True)
class ConnectionSpec:
    """One Airbyte connection of the stage."""

    name: str
    connection_id: str
    owner: str
    stream: Stream


@dataclass(frozen=True, slots=True)
class FivetranSpec:
    """One Fivetran connection of the stage.

    `schema` is its name too. What it is to the warehouse depends on the connector: the destination's schema,
    schema and table with a dot between them, or (a database) what the source's schemas are prefixed with.
    """

    connection_id: str
    service: str
    schema: str
    source_schema: str
    stream: Stream


@dataclass(frozen=True, slots=True)
class DashboardSpec:
    """One semantic model of Power BI, or workbook of Tableau, that shows one table of the warehouse."""

    dashboard_id: str
    name: str
    product: str
    table: str
    owner: str


@dataclass(frozen=True, slots=True)
class SyncSpec:
    """One Hightouch sync of the stage; its model is one table of the warehouse."""

    sync_id: int
    slug: str
    table: str
    primary_key: str
    destination: str
    owner: str


@dataclass(frozen=True, slots=True)
class DbtJobSpec:
    """One dbt Cloud job of the stage."""

    job_id: int
    name: str
    steps: tuple[str, ...]
    real: bool = False
    generate_docs: bool = False


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One Hightouch sync sequence: its syncs run one after the other."""

    sequence_id: str
    name: str
    sync_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CensusSyncSpec:
    """One Census sync of the stage; its source is one table of the warehouse."""

    sync_id: int
    label: str | None
    table: str
    primary_key: str
    destination: str
    operation: str = "upsert"


def _columns(kind: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


FLIGHTS = Stream(
    name="flights",
    schema="raw_flights",
    file="flights.csv.zip",
    primary_key=("time_hour", "carrier", "flight", "origin"),
    columns={
        **_columns(
            "BIGINT", "year month day dep_time sched_dep_time dep_delay arr_time sched_arr_time arr_delay"
        ),
        "carrier": "VARCHAR",
        "flight": "BIGINT",
        **_columns("VARCHAR", "tailnum origin dest"),
        **_columns("BIGINT", "air_time distance hour minute"),
        "time_hour": "TIMESTAMPTZ",
    },
)
WEATHER = Stream(
    name="weather",
    schema="raw_weather",
    file="weather.csv",
    primary_key=("origin", "time_hour"),
    columns={
        "origin": "VARCHAR",
        **_columns("BIGINT", "year month day hour"),
        **_columns("DOUBLE", "temp dewp humid"),
        "wind_dir": "BIGINT",
        **_columns("DOUBLE", "wind_speed wind_gust precip pressure visib"),
        "time_hour": "TIMESTAMPTZ",
    },
)
PLANES = Stream(
    name="planes",
    schema="raw_planes",
    file="planes.csv",
    primary_key=("tailnum",),
    columns={
        "tailnum": "VARCHAR",
        "year": "BIGINT",
        **_columns("VARCHAR", "type manufacturer model"),
        **_columns("BIGINT", "engines seats speed"),
        "engine": "VARCHAR",
    },
)
AIRPORTS = Stream(
    name="airports",
    schema="raw_airports",
    file="airports.csv",
    primary_key=("faa",),
    columns={
        **_columns("VARCHAR", "faa name"),
        **_columns("DOUBLE", "lat lon"),
        **_columns("BIGINT", "alt tz"),
        **_columns("VARCHAR", "dst tzone"),
    },
)
AIRLINES = Stream(
    name="airlines",
    schema="raw_airlines",
    file="airlines.csv",
    primary_key=("carrier",),
    columns=_columns("VARCHAR", "carrier name"),
)

CONNECTIONS = (
    ConnectionSpec("flights", "7f1a6001-2013-4a00-8000-000000000001", "flight-ops", FLIGHTS),
    ConnectionSpec("weather", "7f1a6002-2013-4a00-8000-000000000002", "weather-desk", WEATHER),
    ConnectionSpec("planes", "7f1a6003-2013-4a00-8000-000000000003", "reference-data", PLANES),
    ConnectionSpec("airports", "7f1a6004-2013-4a00-8000-000000000004", "reference-data", AIRPORTS),
    ConnectionSpec("airlines", "7f1a6005-2013-4a00-8000-000000000005", "reference-data", AIRLINES),
)

FIVETRAN_CONNECTIONS = (
    FivetranSpec(
        "gusty_anemometer", "s3", "fivetran_weather", "s3", replace(WEATHER, schema="fivetran_weather")
    ),
    FivetranSpec(
        "jaunty_hangar",
        "postgres",
        "fivetran_fleet",
        "public",
        replace(PLANES, schema="fivetran_fleet_public"),
    ),
    FivetranSpec(
        "prompt_terminal",
        "google_sheets",
        "fivetran_sheets.airports",
        "google_sheets",
        replace(AIRPORTS, schema="fivetran_sheets"),
    ),
)

SYNCS = (
    SyncSpec(101, "carrier-scorecard-to-crm", "marts.mart_carrier_scorecard", "carrier", "crm", "flight-ops"),
    SyncSpec(102, "weather-delays-to-braze", "marts.mart_weather_delays", "origin", "braze", "weather-desk"),
)
SEQUENCES = (SequenceSpec("7", "crm-then-braze", (101, 102)),)

CENSUS_SYNCS = (
    CensusSyncSpec(401, "Fleet to Salesforce", "marts.mart_fleet_utilisation", "tail_number", "Asset"),
    CensusSyncSpec(
        402, "Daily operations to Sheets", "marts.mart_daily_ops", "flight_date", "sheet", "append"
    ),
)

# The first really runs dbt on the stage's project and warehouse; the others are scripted, on a dozen nodes.
DBT_JOBS = (
    DbtJobSpec(301, "nightly build", ("dbt build",), real=True),
    DbtJobSpec(302, "scripted build", ("dbt build",)),
    DbtJobSpec(303, "scripted steps", ("dbt seed", "dbt run", "dbt test"), generate_docs=True),
)

DASHBOARDS = (
    DashboardSpec(
        "da5b0000-2013-4a00-8000-000000000001",
        "Carrier scorecard",
        "power_bi",
        "marts.mart_carrier_scorecard",
        "flight-ops",
    ),
    DashboardSpec(
        "da5b0000-2013-4a00-8000-000000000002",
        "Weather delays",
        "tableau",
        "marts.mart_weather_delays",
        "weather-desk",
    ),
)

NIGHTLY_TAG = "nightly"
OWNERS = ("flight-ops", "weather-desk", "reference-data")

SLACK_TEAM = "T0SANDBOX"
DEFAULT_CHANNEL = "data-alerts"
# channel -> (webhook id, secret): the last two parts of the webhook's path.
WEBHOOKS = {
    DEFAULT_CHANNEL: ("B0DATAALERTS", "sandboxDataAlerts0001"),
    "flight-ops": ("B0FLIGHTOPS", "sandboxFlightOps0002"),
    "weather-desk": ("B0WEATHERDESK", "sandboxWeatherDesk0003"),
    "reference-data": ("B0REFERENCE", "sandboxReferenceData0004"),
}
CHANNEL_IDS = {name: f"C0SANDBOX{number:02}" for number, name in enumerate(WEBHOOKS, 1)}
# What the Web API takes for a channel: its id or its name.
CHANNEL_NAMES = {name: name for name in WEBHOOKS} | {id_: name for name, id_ in CHANNEL_IDS.items()}
SLACK_TOKEN = "xoxb-sandbox-bot-token"  # noqa: S105 - published, as all here

# service -> the key of its Events API integration
PAGERDUTY_KEYS = {
    "data-platform": "R0SANDBOX0DATAPLATFORM0000000001",
    "flight-ops": "R0SANDBOX0FLIGHTOPS0000000000002",
    "weather-desk": "R0SANDBOX0WEATHERDESK00000000003",
}


def workspace_name(workspace_id: str) -> str:
    """What an Airbyte workspace is called."""
    return WORKSPACE_NAME if workspace_id == WORKSPACE_ID else f"Workspace {workspace_id[:8]}"


def tag_id(name: str) -> str:
    """The id of the Airbyte tag of that name, the same in every run."""
    return str(uuid5(NAMESPACE_URL, f"sandbox-tag/{name}"))


def tag(name: str) -> dict[str, str]:
    """An Airbyte tag as the API writes it."""
    color = "1A5276" if name.startswith("owner:") else "FF5733"
    return {"tagId": tag_id(name), "workspaceId": WORKSPACE_ID, "name": name, "color": color}
