select
    flight_date,
    origin_airport,
    count(*) as scheduled_flights,
    {{ count_where('is_cancelled') }} as cancelled_flights,
    {{ count_where('is_diverted') }} as diverted_flights,
    {{ count_where("outcome = 'late'") }} as late_flights,
    {{ share_of('is_cancelled') }} as cancel_rate,
    {{ share_of("outcome = 'on time'") }} as on_time_rate,
    {{ mean_of('departure_delay_minutes') }} as mean_departure_delay_minutes,
    percentile_cont(0.9) within group (order by departure_delay_minutes) as p90_departure_delay_minutes
from {{ ref('fct_flights') }}
group by flight_date, origin_airport
