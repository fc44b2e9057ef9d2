with observations as (

    select
        {{ clean_text('origin') }} as airport,
        {{ clean_timestamp('time_hour') }} as observed_hour_at,
        make_date({{ clean_integer('year') }}, {{ clean_integer('month') }}, {{ clean_integer('day') }}) as observed_on,
        {{ clean_number('temp') }} as temperature_f,
        {{ clean_number('dewp') }} as dew_point_f,
        {{ clean_number('humid') }} as relative_humidity,
        {{ clean_integer('wind_dir') }} as wind_direction_degrees,
        {{ clean_number('wind_speed') }} as wind_speed_mph,
        {{ clean_number('wind_gust') }} as wind_gust_mph,
        {{ clean_number('precip') }} as precipitation_inches,
        {{ clean_number('pressure') }} as pressure_millibars,
        {{ clean_number('visib') }} as visibility_miles,
        _airbyte_extracted_at as extracted_at
    from {{ source('weather_stations', 'weather') }}

)

select
    airport,
    observed_hour_at,
    observed_on,
    temperature_f,
    dew_point_f,
    relative_humidity,
    wind_direction_degrees,
    -- One observation (Newark, February) claims 1,048 mph; no wind on Earth's surface has passed 254.
    case when wind_speed_mph <= 254 then wind_speed_mph end as wind_speed_mph,
    wind_gust_mph,
    precipitation_inches,
    pressure_millibars,
    visibility_miles,
    extracted_at
from observations
