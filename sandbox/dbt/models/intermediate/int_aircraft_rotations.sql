with departures as (

    select
        flight_id,
        flight_date,
        carrier_code,
        tail_number,
        scheduled_departure_at,
        departure_delay_minutes,
        arrival_delay_minutes
    from {{ ref('int_flight_outcomes') }}
    where tail_number is not null and not is_cancelled

)

select
    flight_id,
    flight_date,
    carrier_code,
    tail_number,
    scheduled_departure_at,
    departure_delay_minutes,
    lag(flight_id) over aircraft_day as previous_flight_id,
    lag(arrival_delay_minutes) over aircraft_day as previous_arrival_delay_minutes
from departures
-- Only within a day: overnight there is time enough to make up for any delay.
window aircraft_day as (partition by tail_number, flight_date order by scheduled_departure_at, flight_id)
