with by_carrier as (

    select
        carrier_code,
        count(*) as scheduled_flights,
        count(distinct destination_airport) as destinations,
        {{ share_of("outcome = 'on time'") }} as on_time_rate,
        {{ share_of('is_cancelled') }} as cancel_rate,
        {{ mean_of('arrival_delay_minutes') }} as mean_arrival_delay_minutes,
        {{ share_of("delay_band in ('major', 'extreme')") }} as long_delay_rate,
        max(flight_date) as last_flight_on
    from {{ ref('fct_flights') }}
    group by carrier_code

)

select
    airlines.carrier_code,
    airlines.carrier_name,
    airlines.alliance,
    airlines.business_model,
    by_carrier.scheduled_flights,
    by_carrier.destinations,
    by_carrier.on_time_rate,
    by_carrier.cancel_rate,
    by_carrier.mean_arrival_delay_minutes,
    by_carrier.long_delay_rate,
    rank() over (order by by_carrier.on_time_rate desc) as punctuality_rank,
    by_carrier.last_flight_on
from by_carrier
inner join {{ ref('dim_airlines') }} as airlines
    on by_carrier.carrier_code = airlines.carrier_code
