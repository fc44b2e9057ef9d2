select
    origin_airport,
    scheduled_hour,
    count(*) as scheduled_flights,
    round(cast(count(*) * 1.0 / count(distinct flight_date) as numeric(18, 8)), 2) as flights_per_day,
    {{ mean_of('departure_delay_minutes') }} as mean_departure_delay_minutes,
    {{ share_of('departure_delay_minutes >= ' ~ var('on_time_minutes')) }} as late_departure_rate,
    {{ share_of('is_cancelled') }} as cancel_rate
from {{ ref('fct_flights') }}
group by origin_airport, scheduled_hour
