{{ config(group='flight-ops') }}
-- The file gives the departure twice: as a clock time and as a delay. They must tell the same minute.
select flight_id, scheduled_hour, scheduled_minute, departure_delay_minutes, departed_clock
from {{ ref('stg_flights') }}
where
    departed_clock is not null
    and (scheduled_hour * 60 + scheduled_minute + departure_delay_minutes + 1440) % 1440
    <> ((departed_clock - departed_clock % 100) / 100 * 60 + departed_clock % 100) % 1440
