with flagged as (

    select
        *,
        coalesce(visibility_miles < 3, false) as is_low_visibility,
        coalesce(wind_speed_mph >= 25, false) or coalesce(wind_gust_mph >= 35, false) as is_windy,
        coalesce(precipitation_inches > 0, false) as is_wet,
        coalesce(temperature_f <= 32, false) as is_freezing
    from {{ ref('stg_weather') }}

)

select
    *,
    case
        when
            visibility_miles < 1
            or wind_gust_mph >= 45
            or precipitation_inches >= 0.3
            or (is_wet and is_freezing)
            then 'severe'
        when is_low_visibility or is_windy or is_wet then 'adverse'
        else 'fair'
    end as condition
from flagged
