with by_condition as (

    select
        carrier_code,
        condition,
        count(*) as scheduled_flights,
        {{ mean_of('departure_delay_minutes') }} as mean_departure_delay_minutes,
        {{ share_of('is_cancelled') }} as cancel_rate
    from {{ ref('fct_flight_weather') }}
    where condition <> 'not observed'
    group by carrier_code, condition

)

select
    by_condition.carrier_code,
    by_condition.condition,
    by_condition.scheduled_flights,
    by_condition.mean_departure_delay_minutes,
    by_condition.cancel_rate,
    by_condition.mean_departure_delay_minutes - fair.mean_departure_delay_minutes as added_delay_minutes,
    by_condition.cancel_rate - fair.cancel_rate as added_cancel_rate
from by_condition
left join by_condition as fair
    on
        by_condition.carrier_code = fair.carrier_code
        and fair.condition = 'fair'
