with by_aircraft as (

    select
        tail_number,
        min(flight_date) as first_seen_on,
        max(flight_date) as last_seen_on,
        count(distinct flight_date) as days_flown,
        {{ count_where('not is_cancelled') }} as departures,
        round(cast(sum(air_time_minutes) / 60.0 as numeric(18, 8)), 2) as air_hours,
        cast(sum(case when is_cancelled then 0 else distance_miles end) as bigint) as miles
    from {{ ref('fct_flights') }}
    where tail_number is not null
    group by tail_number

)

select
    by_aircraft.tail_number,
    aircraft.manufacturer,
    aircraft.model,
    aircraft.size_class,
    aircraft.seats,
    cast(extract(year from by_aircraft.last_seen_on) as integer) - aircraft.built_in as age_years,
    by_aircraft.first_seen_on,
    by_aircraft.last_seen_on,
    by_aircraft.days_flown,
    by_aircraft.departures,
    by_aircraft.air_hours,
    by_aircraft.miles,
    by_aircraft.miles * aircraft.seats as seat_miles
from by_aircraft
inner join {{ ref('dim_aircraft') }} as aircraft
    on by_aircraft.tail_number = aircraft.tail_number
