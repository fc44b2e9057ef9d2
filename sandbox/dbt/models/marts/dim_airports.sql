select
    airport,
    airport_name,
    latitude,
    longitude,
    altitude_feet,
    time_zone,
    utc_offset_hours,
    case
        when time_zone = 'America/New_York' then 'East'
        when time_zone = 'America/Chicago' then 'Central'
        when time_zone in ('America/Denver', 'America/Phoenix') then 'Mountain'
        when time_zone in ('America/Los_Angeles', 'America/Vancouver') then 'Pacific'
        when time_zone in ('America/Anchorage', 'Pacific/Honolulu') then 'Alaska and Hawaii'
        else 'unknown'
    end as region,
    airport in ('EWR', 'JFK', 'LGA') as is_new_york
from {{ ref('stg_airports') }}
