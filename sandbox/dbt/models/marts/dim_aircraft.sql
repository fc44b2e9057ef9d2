with versions as (

    select
        *,
        count(*) over (partition by tail_number) as registrations_seen
    from {{ ref('snap_aircraft') }}

)

select
    tail_number,
    manufacturer,
    model,
    aircraft_type,
    engine_type,
    engines,
    seats,
    built_in,
    case
        when seats < 30 then 'light'
        when seats < 100 then 'regional'
        when seats < 250 then 'narrow body'
        else 'wide body'
    end as size_class,
    registrations_seen
from versions
where dbt_valid_to is null
