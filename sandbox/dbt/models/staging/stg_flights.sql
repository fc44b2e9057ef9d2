with flights as (

    select
        make_date({{ clean_integer('year') }}, {{ clean_integer('month') }}, {{ clean_integer('day') }}) as flight_date,
        {{ clean_text('carrier') }} as carrier_code,
        {{ clean_integer('flight') }} as flight_number,
        {{ clean_text('tailnum') }} as tail_number,
        {{ clean_text('origin') }} as origin_airport,
        {{ clean_text('dest') }} as destination_airport,
        {{ clean_timestamp('time_hour') }} as scheduled_hour_at,
        {{ clean_integer('hour') }} as scheduled_hour,
        {{ clean_integer('minute') }} as scheduled_minute,
        {{ clean_integer('dep_time') }} as departed_clock,
        {{ clean_integer('dep_delay') }} as departure_delay_minutes,
        {{ clean_integer('arr_delay') }} as arrival_delay_minutes,
        {{ clean_integer('air_time') }} as air_time_minutes,
        {{ clean_integer('distance') }} as distance_miles,
        _airbyte_extracted_at as extracted_at
    from {{ source('flight_operations', 'flights') }}

)

select
    carrier_code || cast(flight_number as {{ dbt.type_string() }}) || '-' || origin_airport
        || '-' || cast(flight_date as {{ dbt.type_string() }}) as flight_id,
    flight_date,
    carrier_code,
    flight_number,
    tail_number,
    origin_airport,
    destination_airport,
    scheduled_hour,
    scheduled_minute,
    scheduled_hour_at,
    {{ dbt.dateadd('minute', 'scheduled_minute', 'scheduled_hour_at') }} as scheduled_departure_at,
    -- The clock time in the file has no date: a flight that left after midnight would seem to leave a day
    -- early, and midnight is written both as 2400 and as missing. Schedule plus delay has neither problem.
    {{ dbt.dateadd('minute', 'scheduled_minute + departure_delay_minutes', 'scheduled_hour_at') }} as departed_at,
    departed_clock,
    departure_delay_minutes,
    arrival_delay_minutes,
    air_time_minutes,
    distance_miles,
    extracted_at
from flights
