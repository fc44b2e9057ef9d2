select
    {{ clean_text('faa') }} as airport,
    {{ clean_text('name') }} as airport_name,
    {{ clean_number('lat') }} as latitude,
    {{ clean_number('lon') }} as longitude,
    {{ clean_integer('alt') }} as altitude_feet,
    {{ clean_integer('tz') }} as utc_offset_hours,
    {{ clean_text('tzone') }} as time_zone
from {{ source('airport_directory', 'airports') }}
