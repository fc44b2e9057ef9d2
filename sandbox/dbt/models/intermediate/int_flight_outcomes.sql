select
    *,
    departed_at is null as is_cancelled,
    -- A flight that left but has no arrival delay landed somewhere else than planned.
    departed_at is not null and arrival_delay_minutes is null as is_diverted,
    case
        when departed_at is null then 'cancelled'
        when arrival_delay_minutes is null then 'diverted'
        when arrival_delay_minutes < {{ var('on_time_minutes') }} then 'on time'
        else 'late'
    end as outcome
from {{ ref('stg_flights') }}
