select
    {{ clean_text('tailnum') }} as tail_number,
    {{ clean_integer('year') }} as built_in,
    {{ clean_text('type') }} as aircraft_type,
    -- The registry spells the large makers in several ways.
    case
        when {{ clean_text('manufacturer') }} like 'AIRBUS%' then 'AIRBUS'
        when {{ clean_text('manufacturer') }} like 'MCDONNELL DOUGLAS%' then 'MCDONNELL DOUGLAS'
        when {{ clean_text('manufacturer') }} like 'CANADAIR%' then 'CANADAIR'
        else {{ clean_text('manufacturer') }}
    end as manufacturer,
    {{ clean_text('model') }} as model,
    {{ clean_integer('engines') }} as engines,
    {{ clean_integer('seats') }} as seats,
    {{ clean_text('engine') }} as engine_type
from {{ source('aircraft_registry', 'planes') }}
