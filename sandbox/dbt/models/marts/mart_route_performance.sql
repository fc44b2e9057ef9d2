with by_route as (

    select
        origin_airport,
        destination_airport,
        count(*) as scheduled_flights,
        count(distinct carrier_code) as carriers,
        max(distance_miles) as distance_miles,
        {{ mean_of('air_time_minutes') }} as mean_air_time_minutes,
        {{ share_of("outcome = 'on time'") }} as on_time_rate,
        {{ share_of('is_cancelled') }} as cancel_rate,
        {{ share_of('is_diverted') }} as diversion_rate
    from {{ ref('fct_flights') }}
    group by origin_airport, destination_airport

)

select
    by_route.*,
    origins.airport_name as origin_name,
    destinations.airport_name as destination_name,
    coalesce(destinations.region, 'not in directory') as destination_region
from by_route
inner join {{ ref('dim_airports') }} as origins
    on by_route.origin_airport = origins.airport
left join {{ ref('dim_airports') }} as destinations
    on by_route.destination_airport = destinations.airport
