select
    flight_date,
    origin_airport,
    count(*) as scheduled_flights,
    sum(case when is_cancelled then 1 else 0 end) as cancelled_flights,
    sum(case when is_diverted then 1 else 0 end) as diverted_flights,
    sum(case when outcome = 'late' then 1 else 0 end) as late_flights,
    {{ share_of('is_cancelled') }} as cancel_rate,
    {{ share_of("outcome = 'on time'") }} as on_time_rate,
    {{ mean_of('departure_delay_minutes') }} as mean_departure_delay_minutes,
    percentile_cont(0.9) within group (order by departure_delay_minutes) as p90_departure_delay_minutes
from {{ ref('fct_flights') }}
group by flight_date, origin_airport
