select
    airport,
    observed_hour_at,
    observed_on,
    temperature_f,
    wind_speed_mph,
    wind_gust_mph,
    precipitation_inches,
    visibility_miles,
    is_low_visibility,
    is_windy,
    is_wet,
    is_freezing,
    condition
from {{ ref('int_weather_conditions') }}
