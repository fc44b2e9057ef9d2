{{
    config(
        materialized='incremental',
        incremental_strategy='delete+insert',
        unique_key='flight_id',
        on_schema_change='append_new_columns'
    )
}}

with flights as (

    select *
    from {{ ref('int_flight_outcomes') }}
    where {{ increment_window('flight_date') }}

)

select
    flights.flight_id,
    flights.flight_date,
    flights.carrier_code,
    flights.flight_number,
    flights.tail_number,
    flights.origin_airport,
    flights.destination_airport,
    flights.scheduled_hour,
    flights.scheduled_hour_at,
    flights.scheduled_departure_at,
    flights.departed_at,
    flights.departure_delay_minutes,
    flights.arrival_delay_minutes,
    flights.air_time_minutes,
    flights.distance_miles,
    flights.is_cancelled,
    flights.is_diverted,
    flights.outcome,
    delay_bands.delay_band,
    flights.extracted_at
from flights
left join {{ ref('delay_bands') }} as delay_bands
    on
        flights.arrival_delay_minutes >= delay_bands.from_minutes
        and flights.arrival_delay_minutes < delay_bands.below_minutes
